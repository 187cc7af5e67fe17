"""Compare the greedy tokens per second of a sparse model with those of its dense partner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.data.batches import concatenated
from moe_llava.model.modeling import SparseModel
from moe_llava.perf.measure import begin_report, bench_device, compare, dtype_names, spread, summary
from moe_llava.perf.options import BenchError
from moe_llava.perf.pairs import DENSE, SIZES, SPARSE, batch_of, build, image_tokens
from moe_llava.perf.running import show_cases
from moe_llava.serving.engine.prompt import PromptBuilder
from moe_llava.serving.engine.requests import Prompt

TEXT_TOKENS = 12  # of a prompt, after its image
CONTENT = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]  # of the prompt to a checkpoint
STATIC = ", static cache"  # with it generate() compiles the step, on a GPU
Prompts = Callable[[int], dict[str, Tensor]]


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
    models, prompts = models_of(checkpoint, size, dtype, device)
    report = begin_report("generate", device, dtype_names(dtype), rounds)
    report["notes"] = ["tokens/s: of all rows together, with the prefill"]
    with show_cases(report, len(rows), console) as running:
        for number in rows:
            running.begin({"model": checkpoint or size, "rows": number, "new tokens": new_tokens})
            calls: dict[str, Callable[[], object]] = {}
            for name, model in models.items():
                prompt = prompts[name](number)
                calls[name] = partial(write, model, prompt, new_tokens, {})
                if compiled:
                    calls[name + STATIC] = partial(write, model, prompt, new_tokens, {"cache_implementation": "static"})
            timings = compare(calls, rounds, device, running)
            found = summary(timings, DENSE, device)
            for name, one in found.items():
                one["tokens_per_second"] = spread([number * new_tokens / seconds for seconds in timings[name].seconds])
            running.end(DENSE, found)
    return report


def models_of(checkpoint: str | None, size: str, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Any], dict[str, Prompts]]:
    """Return the sparse model and its partner, in evaluation mode, and for each a function that returns its inputs for a number of rows."""
    if checkpoint is None:
        models = {name: build(SIZES[size].config(), name, dtype, device) for name in (DENSE, SPARSE)}
        return models, {name: partial(_random_prompt, model) for name, model in models.items()}
    sparse, processor = load_checkpoint(checkpoint, dtype)
    if not isinstance(sparse, SparseModel):
        rule = "but the benchmark compares a sparse model with its dense partner"
        raise BenchError(f"checkpoint {checkpoint} is a {type(sparse).__name__}, {rule}")
    models = {DENSE: build(sparse.config, DENSE, dtype, device), SPARSE: sparse.to(device)}
    prompt = PromptBuilder(processor).build([{"role": "user", "content": CONTENT}], [Image.new("RGB", (336, 336), "gray")])
    return models, {name: partial(_prompts, model, prompt, sparse.config.image_token_id) for name, model in models.items()}


def _random_prompt(model: Any, rows: int) -> dict[str, Tensor]:
    return batch_of(model, rows, image_tokens(model) + TEXT_TOKENS)


def _prompts(model: Any, prompt: Prompt, placeholder: int, rows: int) -> dict[str, Tensor]:
    """Return `rows` times the same prompt. `placeholder`: the one of its image, which may differ from the model's."""
    ids = torch.tensor([prompt.input_ids] * rows)
    ids = ids.masked_fill(ids == placeholder, model.config.image_token_id)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **concatenated([prompt.inputs] * rows)}
    return {name: value.to(model.device, model.dtype if value.is_floating_point() else None) for name, value in inputs.items()}


def write(model: Any, prompt: dict[str, Tensor], new_tokens: int, settings: dict[str, Any]) -> Tensor:
    """Return the answer's tokens [rows, new_tokens]; no end token comes earlier."""
    out = model.generate(**prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **settings)
    return out[:, prompt["input_ids"].shape[1] :]
