"""Compare a training step of stage III (forward, backward, AdamW) of a sparse model and its rivals with that of its dense partner, whose
wide FFNs are trained; the memory of each, in a process of its own; and the memory that logits of all positions take with a wide
vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from moe_llava.model import SparseModel
from moe_llava.model.losses import logits_at_labels
from moe_llava.perf.measure import add_notes, begin_peak, begin_report, bench_device, compare, dtype_names, in_child, peak_memory, summary
from moe_llava.perf.pairs import DENSE, SIZES, SPARSE, batch_of, build, checked_rivals, labels_of
from moe_llava.perf.rivals import MIXTRAL, RIVALS, loss_with_balance, rival_mlps
from moe_llava.perf.running import show_cases
from moe_llava.training.trainable import choose_parameters

ALL_LOGITS = "sparse, logits of all positions"
MEMORY_STEPS = 2  # the first creates AdamW's moments, which the second has from its start

Batch = dict[str, Tensor]


def bench_train(
    names: Sequence[str],
    dtypes: Sequence[torch.dtype],
    rows: int | None,
    tokens: int | None,
    rounds: int,
    wide: str | None,
    console: Console,
) -> dict[str, Any]:
    """Measure every size, a key of SIZES, in every dtype. `rows` and `tokens` of a batch: default the size's. bfloat16 is autocast, with
    weights in float32, as in the trainer. `wide`: the size whose logits are compared, by memory alone.

    Raise BenchError as `batch_of` and `checked_rivals` do.
    """
    device = bench_device()
    report = begin_report("train", device, dtype_names(*dtypes), rounds)
    report["notes"] += ["peak MB: of a process of its own, beyond what it takes before the model is built"]
    if torch.bfloat16 in dtypes:
        report["notes"].append(f"bfloat16, {MIXTRAL}: its experts compute in float32 all the same, as autocast does not reach grouped_mm")
    with show_cases(report, len(names) * len(dtypes) + bool(wide), console) as running:
        for name in names:
            shape = rows or SIZES[name].rows, tokens or SIZES[name].tokens
            rivals = add_notes(report, checked_rivals(SIZES[name], device))
            for dtype in dtypes:
                running.begin({"size": name, "rows": shape[0], "tokens": shape[1], "dtype": dtype_names(dtype)})
                calls: dict[str, Callable[[], object]] = {
                    which: step_of(*learner(name, which, dtype, device, *shape), dtype, LOSSES.get(which))
                    for which in (DENSE, SPARSE, *rivals)
                }
                found = summary(compare(calls, rounds, device, running), DENSE, device)
                calls.clear()  # releases the models before memory is measured
                _add_memory(found, DENSE, name, dtype, shape)
                running.end(DENSE, found)
        if wide:
            size = SIZES[wide]
            running.begin({"size": wide, "rows": size.rows, "tokens": size.tokens, "dtype": "float32"})
            compared: dict[str, dict[str, Any]] = {ALL_LOGITS: {}, SPARSE: {}}
            _add_memory(compared, ALL_LOGITS, wide, torch.float32, (size.rows, size.tokens))
            running.end(ALL_LOGITS, compared)
    return report


def learner(
    name: str, which: str, dtype: torch.dtype, device: torch.device, rows: int, tokens: int
) -> tuple[LlavaForConditionalGeneration, Batch]:
    """Return (model in training mode, with the trainable parameters of stage III; its batch). All models compute logits only where a label
    is predicted, as under the trainer."""
    size = SIZES[name]
    config = size.config()
    model = build(config, SPARSE if which == ALL_LOGITS else which, torch.float32, device, size.attention)
    ours = isinstance(model, SparseModel)
    if which in RIVALS:
        model.requires_grad_(False)
        for layer in rival_mlps(model):
            layer.requires_grad_(True)
    else:
        choose_parameters(model, "stage3" if ours else "dense", config.moe_layer_indices)
    batch = batch_of(model, rows, tokens)
    labels = labels_of(batch)
    return model.train(), batch | {"labels": labels} | ({} if ours else logits_at_labels(labels))


def step_of(
    model: LlavaForConditionalGeneration,
    batch: Batch,
    dtype: torch.dtype,
    loss_of: Callable[[LlavaForConditionalGeneration, Batch], Tensor] | None = None,
) -> Callable[[], object]:
    """Return a function that runs a step. `loss_of`: computes the loss; default the model itself."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch).loss if loss_of is None else loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss_of_all_logits(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """Return the language loss in its plainest form: logits of all positions, cross entropy over those with labels."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model.lm_head(model.model(**inputs).last_hidden_state)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


LOSSES = {ALL_LOGITS: loss_of_all_logits} | dict.fromkeys(RIVALS, loss_with_balance)  # of the others: the model's own


def _add_memory(found: dict[str, dict[str, Any]], limit: str, name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for which, one in found.items():
        one["memory"] = in_child(_memory_of_steps, name, which, dtype, *shape)
    for one in found.values():
        one["memory_ratio"] = one["memory"] / found[limit]["memory"]


def _memory_of_steps(name: str, which: str, dtype: torch.dtype, rows: int, tokens: int) -> int:
    """Return the peak of bytes in use during steps, with model and optimizer, beyond those in use before."""
    device = bench_device()
    before = begin_peak(device)
    model, batch = learner(name, which, dtype, device, rows, tokens)
    step = step_of(model, batch, dtype, LOSSES.get(which))
    for _ in range(MEMORY_STEPS):
        step()
    return peak_memory(device) - before
