"""Compare the greedy tokens per second of a sparse model with those of its dense partner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.model import MoeLlavaConfig, MoeLlavaForConditionalGeneration
from moe_llava.perf.measure import begin_report, bench_device, compare, dtype_names, spread, summary
from moe_llava.perf.options import BenchError
from moe_llava.perf.pairs import DENSE, SIZES, SPARSE, batch_of, build, image_tokens
from moe_llava.perf.running import show_cases

TEXT_TOKENS = 12  # of a prompt, after its image
STATIC = ", static cache"  # with it generate() compiles the step, on a GPU


def bench_generate(
    checkpoint: str | None,
    size: str,
    dtype: torch.dtype,
    rows: Sequence[int],
    new_tokens: int,
    rounds: int,
    compiled: bool,
    console: Console,
) -> dict[str, Any]:
    """Measure every batch size in `rows`, for `checkpoint` or a random model of a size. `compiled`: also with a static cache.

    Raise BenchError if the checkpoint is not sparse, CheckpointError as `load_checkpoint` does.
    """
    device = bench_device()
    models = models_of(checkpoint, size, dtype, device)
    report = begin_report("generate", device, dtype_names(dtype), rounds)
    report["notes"] = ["tokens/s: of all rows together, with the prefill"]
    with show_cases(report, len(rows), console) as running:
        for number in rows:
            running.begin({"model": checkpoint or size, "rows": number, "new tokens": new_tokens})
            calls: dict[str, Callable[[], object]] = {}
            for name, model in models.items():
                prompt = batch_of(model, number, image_tokens(model) + TEXT_TOKENS)
                calls[name] = partial(write, model, prompt, new_tokens, {})
                if compiled:
                    calls[name + STATIC] = partial(write, model, prompt, new_tokens, {"cache_implementation": "static"})
            timings = compare(calls, rounds, device, running)
            found = summary(timings, DENSE, device)
            for name, one in found.items():
                one["tokens_per_second"] = spread([number * new_tokens / seconds for seconds in timings[name].seconds])
            running.end(DENSE, found)
    return report


def models_of(checkpoint: str | None, size: str, dtype: torch.dtype, device: torch.device) -> dict[str, LlavaForConditionalGeneration]:
    """Return the sparse model and its partner, in evaluation mode."""
    if checkpoint is None:
        config = SIZES[size].config()
        return {name: build(config, name, dtype, device) for name in (DENSE, SPARSE)}
    sparse = load_checkpoint(checkpoint, dtype)[0]
    if not isinstance(sparse, MoeLlavaForConditionalGeneration):
        rule = "but the benchmark compares a sparse LLaVA with its dense partner"
        raise BenchError(f"checkpoint {checkpoint} is a {type(sparse).__name__}, {rule}")
    assert isinstance(sparse.config, MoeLlavaConfig)
    return {DENSE: build(sparse.config, DENSE, dtype, device), SPARSE: sparse.to(device)}


def write(model: LlavaForConditionalGeneration, prompt: dict[str, Tensor], new_tokens: int, settings: dict[str, Any]) -> Tensor:
    """Return the answer's tokens [rows, new_tokens]; no end token comes earlier."""
    out = model.generate(**prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **settings)
    return out[:, prompt["input_ids"].shape[1] :]
