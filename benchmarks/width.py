"""Measure upcycling at the width of a real language model, sparse against the dense model that it was made from: whether both compute the
same, and time and memory of upcycling, loading, a generated token (also with experts on disk, and quantised) and a training step.

    python benchmarks/width.py --language-model runs/real/gemma-3-270m.gguf --vision-tower runs/real/tower --template gemma \\
        --image-size 112 --data runs/real/data/train.json --images runs/real/data/images

`make real` makes these files. Memory is the peak of a process of its own, beyond what it takes when its modules are imported. The training
step is that of stage III: the experts and routers of the sparse model, the FFNs of the same layers of the dense one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_llava import MoeLlavaProcessor, upcycle
from moe_llava.checkpoints.join import join
from moe_llava.checkpoints.load import load_checkpoint, load_config
from moe_llava.checkpoints.offload import load_offloaded
from moe_llava.data.batches import Collator, ConversationDataset
from moe_llava.data.encoder import Encoder
from moe_llava.data.store import load_records
from moe_llava.perf.generate import write
from moe_llava.perf.measure import begin_peak, compare, in_child, peak_memory, summary
from moe_llava.perf.train import step_of
from moe_llava.training.adapters import quantisation_config
from moe_llava.training.trainable import choose_parameters
from moe_llava.training.trainer import logits_at_labels

CPU = torch.device("cpu")
DENSE, SPARSE = "dense", "sparse"
KEPT = 0.5  # of the experts, in the variant with the others on disk
Batch = dict[str, Any]


def save_sparse(dense: Path, sparse: Path) -> None:
    model, processor = load_checkpoint(dense)
    upcycle(model).save_pretrained(sparse)
    MoeLlavaProcessor.from_llava(processor).save_pretrained(sparse)


def read(folder: Path) -> None:
    """Load a checkpoint, and read every weight, since mapped files take time and memory only then."""
    model, _ = load_checkpoint(folder)
    for weight in model.parameters():
        weight.sum()


def variants(dense: Path, sparse: Path) -> dict[str, Callable[[], Any]]:
    """Return functions that load the models whose tokens are timed."""

    def quantised(kind: str) -> Any:
        config = quantisation_config(sparse, kind, load_config(sparse).dtype)
        return load_checkpoint(sparse, quantization_config=config, separate_experts=True, device_map=CPU)[0]

    return {
        DENSE: lambda: load_checkpoint(dense)[0],
        SPARSE: lambda: load_checkpoint(sparse)[0],
        f"sparse, {KEPT:.0%} of the experts kept": lambda: load_offloaded(sparse, KEPT)[0],
        "sparse, --bits 8": lambda: quantised("int8"),
        "sparse, --bits 4": lambda: quantised("nf4"),
    }


def load_and_write(dense: Path, sparse: Path, name: str, prompt: Batch, tokens: int) -> None:
    write(variants(dense, sparse)[name](), prompt, tokens, {})


def batch_of(folder: Path, data: Path, images: Path, rows: int, template: str | None) -> Batch:
    """Return the first records of a file as a batch."""
    encoder = Encoder(load_checkpoint(folder)[1], template)
    items = ConversationDataset(load_records(data, images), encoder)
    return Collator(encoder.nothing())([items[index] for index in range(rows)])


def learner(folder: Path, stage: str, layers: list[int], batch: Batch) -> Callable[[], object]:
    """Return a training step of stage III. Both models compute logits only where a label is predicted, as under the trainer."""
    model, _ = load_checkpoint(folder)
    choose_parameters(model, stage, layers)
    return step_of(model.train(), batch | (logits_at_labels(batch["labels"]) if stage == DENSE else {}), torch.float32)


def two_steps(folder: Path, stage: str, layers: list[int], batch: Batch) -> None:
    step = learner(folder, stage, layers, batch)
    step()
    step()  # with AdamW's moments from its start


def taken(function: Callable[..., object], *arguments: object) -> tuple[float, int]:
    """Return (seconds, bytes at the peak) of a call in a new process."""
    return in_child(_taken, function, *arguments)


def _taken(function: Callable[..., object], *arguments: object) -> tuple[float, int]:
    torch.set_num_threads(2)
    before, began = begin_peak(CPU), time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began, peak_memory(CPU) - before


def largest_difference(dense: Path, sparse: Path, batch: Batch) -> tuple[float, float]:
    """Return (the largest difference of a logit, the largest logit)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.inference_mode():
        first, second = (load_checkpoint(folder)[0](**inputs).logits for folder in (dense, sparse))
    return (first - second).abs().max().item(), first.abs().max().item()


def show(title: str, calls: dict[str, Callable[[], object]], rounds: int, memory: dict[str, int]) -> None:
    """Time the calls in turns, and print a line for each: seconds, ratio to the dense model's, memory, ratio to the dense model's."""
    print(f"{title}, {rounds} rounds", flush=True)
    for name, found in summary(compare(calls, rounds, CPU, lambda _: None), DENSE, CPU).items():
        ratio = found["ratio"]
        print(
            f"  {name:<34} {found['seconds']['median']:7.3f} s  x {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            f"  {memory[name] / 1e6:7,.0f} MB  x {memory[name] / memory[DENSE]:.2f}",
            flush=True,
        )


def measure(made: Path, arguments: argparse.Namespace) -> None:
    dense, sparse = made / DENSE, made / SPARSE
    joined, processor = join(arguments.language_model, arguments.vision_tower, arguments.template, 0, arguments.image_size)
    joined.save_pretrained(dense)
    processor.save_pretrained(dense)
    del joined
    calls: Sequence[tuple[str, Path, tuple[float, int]]] = (
        ("upcycle and save", sparse, taken(save_sparse, dense, sparse)),
        ("load the dense model", dense, taken(read, dense)),
        ("load the sparse model", sparse, taken(read, sparse)),
    )
    for name, folder, (seconds, peak) in calls:
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{name:<24} {seconds:6.1f} s  {peak / 1e6:7,.0f} MB: {peak / weights:.2f} of its {weights / 1e6:,.0f} MB", flush=True)

    batch = batch_of(dense, arguments.data, arguments.images, arguments.rows, arguments.template)
    difference, largest = largest_difference(dense, sparse, batch)
    print(f"largest difference of logits {difference:.2g}, largest logit {largest:.3g}, {batch['input_ids'].numel():,} tokens", flush=True)

    first: dict[str, Tensor] = {name: value[:1] for name, value in batch.items() if name != "labels"}
    loaders = variants(dense, sparse)
    memory = {name: taken(load_and_write, dense, sparse, name, first, arguments.new_tokens)[1] for name in loaders}
    written: dict[str, Callable[[], object]] = {
        name: partial(write, load(), first, arguments.new_tokens, {}) for name, load in loaders.items()
    }
    show(f"{arguments.new_tokens} tokens after {first['input_ids'].numel()}, with loading in the memory", written, arguments.rounds, memory)
    written.clear()

    layers = load_config(sparse).moe_layer_indices
    learners = {DENSE: (dense, DENSE, layers, batch), SPARSE: (sparse, "stage3", layers, batch)}
    memory = {name: taken(two_steps, *each)[1] for name, each in learners.items()}
    show(f"a training step, {arguments.rows} rows", {name: learner(*each) for name, each in learners.items()}, arguments.rounds, memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--language-model", required=True)
    parser.add_argument("--vision-tower", required=True)
    parser.add_argument("--template")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    with tempfile.TemporaryDirectory() as made:
        measure(Path(made), parser.parse_args())


if __name__ == "__main__":
    main()
