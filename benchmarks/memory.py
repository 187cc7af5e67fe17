"""Compare the memory of training steps that `moe-llava params` predicts with what a process takes: stages II and III of a joined LLaVA of
width 512 with 8 layers, dense and sparse, with and without gradient checkpointing, in float32 on a CPU.

    python benchmarks/memory.py --rows 4 --length 400 --labels 100

Each case runs in a process of its own. Measured is the growth of its peak resident memory from before the model is made to the end of
two steps of two micro batches each, so that gradients and moments are there when the activations are. A step of a tiny model comes first,
because it imports modules. The allocator returns freed blocks to the system at once, as torch's caching allocator would reuse them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from moe_llava import upcycle
from moe_llava.model import SparseModel
from moe_llava.perf.measure import begin_peak, peak_memory
from moe_llava.training.budget import count, stage_cost
from moe_llava.training.memory import Batch
from moe_llava.training.trainable import checkpoint_layers, choose_parameters
from moe_llava.training.trainer import logits_at_labels

CPU, IMAGE, VOCABULARY = torch.device("cpu"), 7999, 8000
STAGES = ("stage2", "stage3", "dense")


def make_model(stage: str, width: int = 512) -> Any:
    """Return the model of a stage: sparse in stage III; "dense" is the baseline of stage III."""
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=8
    )
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE))
    return upcycle(model) if stage == "stage3" else model


def make_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    ids = torch.randint(0, IMAGE, (batch.rows, batch.length))
    ids[:, 1:65] = IMAGE
    labels = torch.full_like(ids, -100)
    labels[:, -batch.labelled // batch.rows :] = ids[:, -batch.labelled // batch.rows :]
    inputs = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch.rows, 3, 64, 64),
    }
    return inputs if isinstance(model, SparseModel) else inputs | logits_at_labels(labels)


def measure(stage: str, checkpointing: bool, batch: Batch, results: Any) -> None:
    """Put the growth of the peak of this process, in bytes."""
    torch.set_num_threads(1)
    train(stage, checkpointing, Batch(1, 80, 8), 32)
    before = begin_peak(CPU)
    train(stage, checkpointing, batch, 512)
    results.put(peak_memory(CPU) - before)


def train(stage: str, checkpointing: bool, batch: Batch, width: int) -> None:
    model = make_model(stage, width).train()
    choose_parameters(model, stage, list(range(0, 8, 2)))
    if checkpointing:
        checkpoint_layers(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    for _ in range(2):
        for _ in range(2):
            model(**make_inputs(model, batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def generate(tokens: int, results: Any) -> None:
    """Put the growth of the peak of this process while it generates the last of `tokens` tokens, in float32."""
    torch.set_num_threads(1)
    write(tokens=32, width=32)
    before = begin_peak(CPU)
    write(tokens, width=512)
    results.put(peak_memory(CPU) - before)


def write(tokens: int, width: int) -> None:
    model = make_model("stage2", width).eval()
    with torch.inference_mode():
        model.generate(input_ids=torch.ones(1, tokens - 16, dtype=torch.long), max_new_tokens=16, min_new_tokens=16)


def in_new_process(function: Any, *arguments: Any) -> int:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read when a process starts
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    found: int = results.get(timeout=600)
    process.join()
    return found


def show(name: str, predicted: int, measured: int) -> None:
    print(
        f"{name:<28} predicted {predicted / 1e6:8.1f} MB, measured {measured / 1e6:8.1f} MB, ratio {predicted / measured:.2f}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--labels", type=int, default=100, help="positions with a label, of each row")
    parser.add_argument("--context", type=int, default=2000, help="tokens of generation")
    arguments = parser.parse_args()
    batch = Batch(arguments.rows, arguments.length, arguments.rows * arguments.labels)
    for stage in STAGES:
        with torch.device("meta"):
            model = make_model("stage2" if stage == "dense" else stage)
        for checkpointing in (False, True):
            cost = stage_cost(model, stage, list(range(0, 8, 2)), None, checkpointing, batch=batch)
            assert cost.peak is not None
            name = f"{stage}{', checkpointing' if checkpointing else ''}"
            show(name, cost.peak, in_new_process(measure, stage, checkpointing, batch))
    with torch.device("meta"):
        budget = count(make_model("stage2"))
    # in float32, twice the bytes of bfloat16
    predicted = 2 * (budget.weight_bytes + arguments.context * budget.cache_bytes)
    show(f"generate, {arguments.context:,} tokens", predicted, in_new_process(generate, arguments.context))


if __name__ == "__main__":
    main()
