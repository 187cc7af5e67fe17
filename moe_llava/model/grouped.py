"""Rows sorted by expert, and products with every expert's matrix over its own rows.

A dense FFN K times as wide does the same arithmetic. What a sparse one does beside it is to bring rows to their experts and back, so
that is all gathering, in both directions: the gradient of a permutation is the inverse permutation, where autograd would scatter. The
products of all experts write into one output, and their gradients into one stack, where autograd would fill a stack per expert.

Shapes: T tokens, K experts per token, S = T * K rows, E experts, D and F widths.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Order(NamedTuple):
    """`rows` [S]: row t * K + k is token t's, for its choice k; here they stand sorted by expert. `tokens` [S]: t of each. `places` [T, K]:
    where each went. `counts`: rows of each expert; rows of experts that are elsewhere come last, and count nowhere."""

    rows: Tensor
    tokens: Tensor
    places: Tensor
    counts: list[int]


def sort_by_expert(ids_TK: Tensor, num_experts: int) -> Order:
    ids_S = ids_TK.reshape(-1)
    rows = ids_S.argsort(stable=True)
    places = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=rows.device))
    return Order(rows, rows // ids_TK.shape[1], places.view_as(ids_TK), ids_S.bincount(minlength=num_experts)[:num_experts].tolist())


def dispatch(x_TD: Tensor, order: Order) -> Tensor:
    """[S, D]: each token once for each of its experts, sorted by expert."""
    return _Dispatch.apply(x_TD, order) if torch.is_grad_enabled() else x_TD.index_select(0, order.tokens)


def combine(y_SD: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
    """[T, D]: the sum of what a token's experts made of it, times their weights."""
    return _Combine.apply(y_SD, weights_TK, order) if torch.is_grad_enabled() else _weighted_sum(y_SD, weights_TK, order)


def linear(weights: dict[str, Tensor], x_ND: Tensor, name: str) -> Tensor:
    """[N, F]: F.linear with the matrix `name` [F, D] and the bias `name`_bias [F], if there is one."""
    return F.linear(x_ND, weights[name], weights.get(f"{name}_bias"))


def grouped_linear(stacks: dict[str, Tensor], counts: list[int], x_SD: Tensor, name: str) -> Tensor:
    """[S, F]: the same of rows sorted by expert, with matrices [E, F, D] and biases [E, F]. Rows that count nowhere become 0."""
    inputs: list[Any] = [x_SD, stacks[name], stacks.get(f"{name}_bias")]
    device = x_SD.device.type
    if torch.is_autocast_enabled(device):
        inputs = [None if given is None else given.to(torch.get_autocast_dtype(device)) for given in inputs]
    return _GroupedLinear.apply(*inputs, counts)


def rows_of(counts: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, and which."""
    borders = pairwise(accumulate(counts, initial=0))
    return [(expert, slice(start, end)) for expert, (start, end) in enumerate(borders) if end > start]


def _weighted_sum(y_SD: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
    choices = zip(order.places.unbind(1), weights_TK[..., None].unbind(1), strict=True)
    sum_TD, *others = (y_SD.index_select(0, places_T) * weight_T1 for places_T, weight_T1 in choices)
    for other_TD in others:
        sum_TD += other_TD
    return sum_TD


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Order) -> Tensor:
        ctx.places_TK = order.places
        return x_TD.index_select(0, order.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None]:
        grad_TD, *others = (grad_SD.index_select(0, places_T) for places_T in ctx.places_TK.unbind(1))
        for other_TD in others:
            grad_TD += other_TD
        return grad_TD, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(y_SD, weights_TK)
        ctx.order = order
        return _weighted_sum(y_SD, weights_TK, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_SD, weights_TK = ctx.saved_tensors
        grad_SD = grad_TD.index_select(0, ctx.order.tokens)
        grad_weights_S = (y_SD * grad_SD).sum(-1)
        grad_SD *= weights_TK.reshape(-1).index_select(0, ctx.order.rows)[:, None]
        return grad_SD.to(y_SD.dtype), grad_weights_S[ctx.order.places].to(weights_TK.dtype), None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_SD, weight_EFD)
        ctx.counts = counts
        y_SF = x_SD.new_empty(len(x_SD), weight_EFD.shape[1])
        for expert, rows in rows_of(counts):
            if bias_EF is None:
                torch.mm(x_SD[rows], weight_EFD[expert].t(), out=y_SF[rows])
            else:
                torch.addmm(bias_EF[expert], x_SD[rows], weight_EFD[expert].t(), out=y_SF[rows])
        y_SF[sum(counts) :] = 0
        return y_SF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SF: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_SD, weight_EFD = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x_SD = torch.empty_like(x_SD) if needs_x else None
        grad_weight_EFD = torch.empty_like(weight_EFD) if needs_weight else None
        grad_bias_EF = grad_SF.new_zeros(weight_EFD.shape[:2]) if needs_bias else None
        for expert, rows in rows_of(ctx.counts):
            if grad_x_SD is not None:
                torch.mm(grad_SF[rows], weight_EFD[expert], out=grad_x_SD[rows])
            if grad_weight_EFD is not None:
                torch.mm(grad_SF[rows].t(), x_SD[rows], out=grad_weight_EFD[expert])
            if grad_bias_EF is not None:
                torch.sum(grad_SF[rows], dim=0, out=grad_bias_EF[expert])
        if grad_x_SD is not None:
            grad_x_SD[sum(ctx.counts) :] = 0
        if grad_weight_EFD is not None:
            for expert, count in enumerate(ctx.counts):
                if not count:
                    grad_weight_EFD[expert] = 0
        return grad_x_SD, grad_weight_EFD, grad_bias_EF, None
