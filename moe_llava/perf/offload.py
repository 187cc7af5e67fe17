"""Measure the speed of a sparse model against the share of its experts that memory has room for.

The variants have the same prompt and take turns at every token after it. The tokens are random, so that repetition does not help to predict
the next experts. A turn ends when no read is in progress. `cold`: an expert that is not in memory is read from disk each time, as when
memory has no room for the file either; otherwise it comes from the page cache.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig

from moe_llava.checkpoints.load import load_config, load_model
from moe_llava.checkpoints.offload import Counts, ExpertCache, FileStack, offload_experts
from moe_llava.checkpoints.weights import find_weights, read_tables, shape_bytes
from moe_llava.model import MoeLlavaConfig, MoeLlavaForConditionalGeneration, SparseConfig
from moe_llava.perf.measure import Timings, begin_report, summary
from moe_llava.perf.options import BenchError
from moe_llava.perf.running import Cases, show_cases

CPU = torch.device("cpu")
PROMPT = 64  # tokens of the prefill
WHOLE, AHEAD, NEEDED = "all in memory", "fetched ahead", "fetched when needed"
ALIKE = "alike"
ROUTERS = ("independent", ALIKE)  # of random checkpoints


class ColdStack(FileStack):
    """Remove what was read from the page cache."""

    def read(self, expert: int, out: torch.Tensor) -> None:
        super().read(expert, out)
        os.posix_fadvise(self.descriptor, self.begin(expert), shape_bytes(*self.layout), os.POSIX_FADV_DONTNEED)


class Runner:
    """A model that decodes, and the seconds and processor seconds of each forward pass. `experts`: None if all are in memory."""

    def __init__(self, model: Any, experts: ExpertCache | None = None):
        self.model = model
        self.experts = experts
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self._past = DynamicCache()

    @torch.inference_mode()
    def run(self, ids_S: torch.Tensor) -> None:
        processor, begin = time.process_time(), time.perf_counter()
        self.model(input_ids=ids_S[None], past_key_values=self._past, use_cache=True, logits_to_keep=1)
        if self.experts is not None:
            self.experts.settle()
        self.seconds.append(time.perf_counter() - begin)
        self.processor.append(time.process_time() - processor)

    def reset(self) -> None:
        self.seconds, self.processor, self._past = [], [], DynamicCache()
        if self.experts is not None:
            self.experts.counts = Counts()


def bench_offload(checkpoint: Path | None, shares: Sequence[float], tokens: int, console: Console) -> dict[str, Any]:
    """Measure, for each share of the experts in memory and for cold and cached files, `tokens` decoded after a prompt of PROMPT, and the
    prefill by itself. Default checkpoints: two random ones, whose routers are the worst and the best to predict.

    Raise ValueError as `offload_experts` does, and BenchError if the checkpoint is dense.
    """
    report = begin_report("offload", CPU, "as stored", tokens)
    total = 2 * len(shares) * (1 if checkpoint else len(ROUTERS))
    with tempfile.TemporaryDirectory() as made, show_cases(report, total, console) as running:
        folders = {checkpoint.name: checkpoint} if checkpoint else {name: Path(made) / name for name in ROUTERS}
        for name, folder in folders.items():
            if checkpoint is None:
                random_checkpoint(folder, alike=name == ALIKE)
            _measure(name, folder, shares, running)
    return report


def _measure(name: str, folder: Path, shares: Sequence[float], running: Cases) -> None:
    config = load_config(folder)
    if not isinstance(config, SparseConfig):
        raise BenchError(f"checkpoint {folder} is dense: it has no experts to keep or to offload")
    ids_S = torch.randint(
        3, config.text_config.vocab_size, (PROMPT + running.report["rounds"],), generator=torch.Generator().manual_seed(0)
    )
    ids_S[ids_S == config.image_token_id] = 3
    whole = Runner(_whole(folder))
    for share in shares:
        for cold in (False, True):
            running.begin({"model": name, "kept": f"{share:g}", "files": "cold" if cold else "in the system's cache"})
            running.end(WHOLE, _variants(whole, folder, share, cold, ids_S, running))


def _variants(
    whole: Runner, folder: Path, share: float, cold: bool, ids_S: torch.Tensor, advance: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """Measure one share. Cold variants do not run beside cached ones, which would fill the page cache."""
    runners = {WHOLE: whole, AHEAD: _offloaded(folder, share, True, cold), NEEDED: _offloaded(folder, share, False, cold)}
    for _ in range(2):  # the second time counts
        for runner in runners.values():
            runner.reset()
            runner.run(ids_S[:PROMPT])
    for token in ids_S[PROMPT:, None]:
        for runner in runners.values():
            runner.run(token)
        advance(1)
    found = summary({name: Timings(runner.seconds[1:], runner.processor[1:]) for name, runner in runners.items()}, WHOLE, CPU)
    for name, runner in runners.items():
        found[name]["prompt_ratio"] = runner.seconds[0] / whole.seconds[0]
        if runner.experts is not None:
            counts = runner.experts.counts
            found[name] |= {"hits": counts.hits / (counts.hits + counts.misses), "counts": asdict(counts)}
    return found


def _load(folder: Path) -> MoeLlavaForConditionalGeneration:
    model = load_model(folder)
    model.set_experts_implementation("eager")
    return model


def _whole(folder: Path) -> MoeLlavaForConditionalGeneration:
    """Load the model with experts that are read, not mapped: mapped pages would stay in the page cache, and nothing would be cold."""
    model, tables = _load(folder), read_tables(find_weights(folder))
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            tables[name].read_into(values)
            parameter.data = values
    return model


def _offloaded(folder: Path, share: float, ahead: bool, cold: bool) -> Runner:
    model = _load(folder)
    cache = offload_experts(model, share, CPU, folder)
    if not ahead:
        cache.likely = 1.0
    if cold:
        cache.stacks = [{name: ColdStack(**vars(stack)) for name, stack in layer.items()} for layer in cache.stacks]
    return Runner(model, cache)


def random_checkpoint(folder: Path, alike: bool, width: int = 1024, ffn_width: int = 2048, layers: int = 16, experts: int = 8) -> None:
    """Save a random sparse model of the llama family, with experts in every other layer. Its routers are independent: the worst case for
    predictions. `alike`: all layers have the same router, so a token keeps most of its experts from layer to layer: the best case."""
    text = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=ffn_width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    config = MoeLlavaConfig(vision_config=vision, text_config=text, num_experts=experts, image_token_index=999)
    torch.manual_seed(0)
    model = MoeLlavaForConditionalGeneration(config)
    with torch.no_grad():
        # As large as what layers add, so that a token's state changes little from layer to layer.
        model.get_input_embeddings().weight.normal_()
        mlps = list(model.sparse_mlps().values())
        for mlp in mlps[1:] if alike else ():
            mlp.router.weight.copy_(mlps[0].router.weight)
    model.save_pretrained(folder)
