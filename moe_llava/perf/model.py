"""The forward pass of a whole sparse model, as it reads a prompt, against that of its dense partner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from moe_llava.perf.measure import begin_report, bench_device, compare, dtype_names, summary
from moe_llava.perf.pairs import DENSE, SIZES, batch_of, pair
from moe_llava.perf.running import show_cases


def bench_model(
    names: Sequence[str], dtypes: Sequence[torch.dtype], rows: int | None, tokens: int | None, rounds: int, console: Console
) -> dict[str, Any]:
    """Every size, a key of SIZES, in every dtype; `rows` and `tokens` of a batch are the size's if nothing is said.

    Raises BenchError as `batch_of` does.
    """
    device, sizes = bench_device(), [SIZES[name] for name in names]
    report = begin_report("model", device, dtype_names(*dtypes), rounds)
    with show_cases(report, len(sizes) * len(dtypes), console) as running:
        for name, size in zip(names, sizes, strict=True):
            for dtype in dtypes:
                models = pair(size, dtype, device)
                asked = rows or size.rows, tokens or size.tokens
                running.begin({"size": name, "rows": asked[0], "tokens": asked[1], "dtype": dtype_names(dtype)})
                batches = {which: batch_of(model, *asked) for which, model in models.items()}
                calls: dict[str, Callable[[], object]] = {which: partial(_read, model, batches[which]) for which, model in models.items()}
                running.end(DENSE, summary(compare(calls, rounds, device, running), DENSE, device))
    return report


@torch.no_grad()
def _read(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """As generation reads a prompt: logits of the last position only."""
    model(**batch, logits_to_keep=1)
