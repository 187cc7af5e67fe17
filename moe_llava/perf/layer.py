"""Compare a sparse layer with a dense one of equal active width, forward and backward, and with other implementations.

Shapes: T tokens, D width, F width of the dense FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from moe_llava.perf.layers import DENSE, OURS, dense_layer, errors, layer_variants, our_layer, random_weights
from moe_llava.perf.measure import (
    Timings,
    add_notes,
    begin_peak,
    begin_report,
    bench_device,
    compare,
    dtype_names,
    peak_memory,
    ratios,
    summary,
)
from moe_llava.perf.options import BOTH, FORWARD, LayerSize
from moe_llava.perf.rivals import output_of
from moe_llava.perf.running import show_cases

GROWTH, GROWTH_EXPERTS = LayerSize(2048, 256, 704), (4, 16, 64)
GROWTH_WAYS = {OURS: None, f"{OURS}, grouped_mm": "grouped_mm"}
PRODUCTS = "matrix products alone"  # of the dense FFN: the most that the machine can do for these shapes
PRODUCTS_FP8 = f"{PRODUCTS}, FP8"
FP8_CAPABILITY = (8, 9)  # of the first GPUs that have FP8 products


def bench_layer(
    sizes: Sequence[LayerSize], dtypes: Sequence[torch.dtype], phases: Sequence[str], rounds: int, growth: bool, console: Console
) -> dict[str, Any]:
    """Measure every size in every dtype and phase; a single token forward only, since nobody trains on one. `growth`: also measure how the
    time grows with the number of experts.

    Raise BenchError if a variant deviates from float64.
    """
    device = bench_device()
    report = begin_report("layer", device, dtype_names(*dtypes), rounds)
    cases = [(size, dtype, [phase for phase in phases if size.tokens > 1 or phase == FORWARD]) for size in sizes for dtype in dtypes]
    grown = [(dtype, phase) for dtype in dtypes for phase in phases] if growth else []
    total = sum(len(chosen) for _, _, chosen in cases) + len(grown)
    with show_cases(report, total, console) as running:
        for size, dtype, chosen in cases:
            variants = add_notes(report, layer_variants(size, dtype, device))
            found = errors(size, variants, dtype, device, backward=BOTH in chosen)
            for phase in chosen:
                running.begin(_labels(size, dtype, phase))
                calls = _calls(variants, size, dtype, phase, device)
                measured = _measured(calls, size, phase, rounds, device, running)
                for name, error in found.items():
                    measured[name]["error"] = error
                running.end(DENSE, measured)
        for dtype, phase in grown:
            experts = f"{GROWTH.top_k} of {GROWTH_EXPERTS[0]} to {GROWTH_EXPERTS[-1]}"
            running.begin(_labels(GROWTH, dtype, phase) | {"experts": experts})
            running.end(DENSE, _growth(dtype, phase, rounds, device, running))
    return report


def _labels(size: LayerSize, dtype: torch.dtype, phase: str) -> dict[str, str]:
    return {"TxDxF": str(size), "experts": f"{size.top_k} of {size.experts}", "dtype": dtype_names(dtype), "phase": phase}


def _calls(
    variants: dict[str, nn.Module], size: LayerSize, dtype: torch.dtype, phase: str, device: torch.device
) -> dict[str, Callable[[], object]]:
    x_1TD, gradient_1TD = (torch.randn(1, size.tokens, size.width, device=device, dtype=dtype) for _ in range(2))
    products: dict[str, Callable[[], object]] = {PRODUCTS: _products(size, phase, x_1TD[0], gradient_1TD[0])}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY and phase == FORWARD:
        products[PRODUCTS_FP8] = fp8_products(size, dtype, device)
    if phase == FORWARD:
        return {name: partial(_forward, layer, x_1TD) for name, layer in variants.items()} | products
    return {name: partial(_forward_backward, layer, x_1TD, gradient_1TD) for name, layer in variants.items()} | products


def _products(size: LayerSize, phase: str, x_TD: Tensor, gradient_TD: Tensor) -> Callable[[], object]:
    """Return a function that computes the matrix products of the dense FFN and of its gradients into the same memory each time, without
    activation or autograd."""
    wide = size.top_k * size.ffn_width
    gate_FD, up_FD, down_DF = (x_TD.new_empty(shape).normal_() for shape in ((wide, size.width), (wide, size.width), (size.width, wide)))
    gate_TF, up_TF, hidden_TF = (x_TD.new_empty(size.tokens, wide).normal_() for _ in range(3))
    y_TD, out_FD, out_DF = torch.empty_like(x_TD), torch.empty_like(gate_FD), torch.empty_like(down_DF)
    products = [(x_TD, gate_FD.T, gate_TF), (x_TD, up_FD.T, up_TF), (hidden_TF, down_DF.T, y_TD)]
    if phase == BOTH:
        products += [(gradient_TD, down_DF, hidden_TF), (gradient_TD.T, hidden_TF, out_DF)]
        for each_TF, each_FD in ((gate_TF, gate_FD), (up_TF, up_FD)):
            products += [(each_TF, each_FD, y_TD), (each_TF.T, x_TD, out_FD)]

    def compute() -> None:
        for first, second, out in products:
            torch.mm(first, second, out=out)

    return compute


def fp8_products(size: LayerSize, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Return a function that computes the products of the forward pass of numbers that are float8 (e4m3) already, with one scale for each
    matrix: what quantised experts could gain at most."""
    wide, one = size.top_k * size.ffn_width, torch.ones((), device=device)
    shapes = ((size.tokens, size.width), (2 * wide, size.width)), ((size.tokens, wide), (size.width, wide))
    pairs = [[torch.randn(shape, device=device).to(torch.float8_e4m3fn) for shape in pair] for pair in shapes]

    def compute() -> None:
        for rows, weight in pairs:
            F.scaled_mm(rows, weight.T, one, F.ScalingType.TensorWise, one, F.ScalingType.TensorWise, output_dtype=dtype)

    return compute


@torch.no_grad()
def _forward(layer: nn.Module, x_1TD: Tensor) -> None:
    output_of(layer, x_1TD)


def _forward_backward(layer: nn.Module, x_1TD: Tensor, gradient_1TD: Tensor) -> None:
    """Compute the gradients of input and all weights, and drop them."""
    x_1TD = x_1TD.detach().requires_grad_()
    output_of(layer, x_1TD).backward(gradient_1TD)
    layer.zero_grad(set_to_none=True)


def _measured(
    calls: dict[str, Callable[[], object]],
    size: LayerSize,
    phase: str,
    rounds: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
    """Return the measurements of each call; on a GPU also its FLOP/s and its memory."""
    measured = summary(compare(calls, rounds, device, advance), DENSE, device)
    if device.type == "cuda":
        for name, one in measured.items():
            one["tflops"] = size.flops * (1 if phase == FORWARD else 3) / one["seconds"]["median"] / 1e12
            one["memory"] = _memory_of(calls[name], device)
    return measured


def _memory_of(call: Callable[[], object], device: torch.device) -> int:
    """Return the bytes of GPU memory that a call takes beyond those in use before."""
    before = begin_peak(device)
    call()
    return peak_memory(device) - before


def _growth(dtype: torch.dtype, phase: str, rounds: int, device: torch.device, advance: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """Send the same tokens through layers with ever more experts; each token takes equally many, so the arithmetic is the same."""
    sizes = {experts: LayerSize(GROWTH.tokens, GROWTH.width, GROWTH.ffn_width, experts, GROWTH.top_k) for experts in GROWTH_EXPERTS}
    variants = {DENSE: dense_layer(GROWTH, dtype, device)}
    for experts, size in sizes.items():
        weights = random_weights(size, dtype, device)
        variants |= {f"{way}, {experts} experts": our_layer(size, weights, backend) for way, backend in GROWTH_WAYS.items()}
    calls = _calls(variants, GROWTH, dtype, phase, device)
    timings = compare(calls, rounds, device, advance)
    measured = summary(timings, DENSE, device)
    for way in GROWTH_WAYS:
        for experts in GROWTH_EXPERTS:
            measured[f"{way}, {experts} experts"]["growth"] = growth_of(timings, way, experts)
    return measured


def growth_of(timings: dict[str, Timings], way: str, experts: int) -> dict[str, float]:
    """Return the time over that with the fewest experts."""
    return ratios(timings[f"{way}, {experts} experts"].seconds, timings[f"{way}, {GROWTH_EXPERTS[0]} experts"].seconds)
