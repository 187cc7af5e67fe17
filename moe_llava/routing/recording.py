"""What the routers of a model return in its forward passes, recorded by forward hooks.

Shapes: B rows of a batch, S sequence, T tokens of one pass, E experts, K experts per token.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_llava.data.encoder import EXPERT_TYPES
from moe_llava.routing.routers import find_routers, layer_index, routers_within, vision_routers
from moe_llava.routing.tokens import RoutingError

Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # logits, weights, expert indices, dropped


@dataclass(frozen=True)
class Pass:
    """The output of the router of a layer in one forward pass. `evidence`: the output with at least two experts, which reveals the rule.
    `ours`: whether it reports dropped assignments, as this package's routers do."""

    router: str
    output: Parts
    evidence: Parts
    ours: bool


Recorded = dict[int, list[Pass]]


@contextlib.contextmanager
def recording(model: PreTrainedModel) -> Iterator[Recorded]:
    """Record layer -> the output of its router in each forward pass, while the context lasts.

    Where a block holds a router for the tokens of text and one for those of images, they are recorded as one, which gives the experts of
    the other type a probability of 0; the experts of text come first.
    """
    recorded: Recorded = {}
    handles = []
    try:
        for name, block in find_routers(model).items():
            passes = recorded.setdefault(layer_index(name), [])
            routers = routers_within(model, name)
            found: list[list[Pass]] = [passes] if len(routers) == 1 else [[] for _ in routers]
            for router, own in zip(routers, found, strict=True):
                handles.append(model.get_submodule(router).register_forward_hook(_appending(own, router), with_kwargs=True))
            if len(routers) > 1:
                handles.append(block.register_forward_hook(_merging(passes, found, name, block), with_kwargs=True))
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def counting_patches(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Count for each router outside the language model, by its label, the assignments [E] of patches while the context lasts."""
    counts, handles = {}, []
    try:
        for label, name in vision_routers(model).items():
            router: Any = model.get_submodule(name)
            counts[label] = torch.zeros(router.num_experts, dtype=torch.long)
            handles.append(router.register_forward_hook(partial(_count, counts[label])))
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _count(counts_E: Tensor, module: nn.Module, arguments: Any, output: Parts) -> None:
    counts_E += torch.bincount(output[2].flatten().cpu(), minlength=len(counts_E))


def _appending(passes: list[Pass], name: str) -> Any:
    def append(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        router = f"{name} ({type(module).__name__})"
        parts = _parts(router, output)
        evidence = parts
        if parts[1].shape[1] == 1 and parts[0].shape[1] > 1:
            evidence = _with_two_experts(router, module, arguments, keywords)
        passes.append(Pass(router, parts, evidence, ours=_reports_drops(output)))

    return append


def _with_two_experts(router: str, module: nn.Module, arguments: Any, keywords: Any) -> Parts:
    """Return the output of a top-1 router if it chooses two experts. Raise RoutingError if it cannot."""
    twin: Any = copy.copy(module)  # shares the weights; the model's own router does not change
    twin.top_k = 2
    parts = _parts(router, twin.forward(*arguments, **keywords))
    if parts[1].shape[1] != 2:
        raise RoutingError(
            f"the router {router} chooses one expert, and does not choose two by `top_k`, so how it weighs experts is not known"
        )
    return parts


def _parts(router: str, output: Any) -> Parts:
    """Return the four parts of a router's output. Raise RoutingError unless it begins with logits [T, E], weights [T, K] and expert indices
    [T, K]."""
    found = output if isinstance(output, tuple) else (output,)
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else None for value in found]
    logits, weights, ids = [*shapes, None, None, None][:3]
    well_formed = logits and ids and len(logits) == len(ids) == 2 and weights == ids and logits[1] >= ids[1]
    if not well_formed or found[2].is_floating_point():
        raise RoutingError(
            f"the router {router} returned shapes {shapes}, but to be traced it must return logits [T, E], weights [T, K] and expert "
            "indices [T, K]"
        )
    dropped = found[3] if _reports_drops(found) else torch.zeros_like(found[2], dtype=torch.bool)
    return found[0].detach(), found[1].detach(), found[2].detach(), dropped.detach()


def _reports_drops(output: tuple[Any, ...]) -> bool:
    return len(output) > 3 and isinstance(output[3], Tensor) and output[3].dtype == torch.bool and output[3].shape == output[2].shape


def _merging(passes: list[Pass], found: Sequence[list[Pass]], name: str, module: nn.Module) -> Any:
    """Return a hook of the block `module`, called `name`, that joins what its two routers found in a pass, by the types of tokens that the
    block is given. Raise RoutingError if it has other routers, or is given no types."""
    block, signature = f"{name} ({type(module).__name__})", inspect.signature(module.forward)
    if len(found) != 2 or EXPERT_TYPES not in signature.parameters:
        raise RoutingError(f"{block} has {len(found)} routers, and does not say which tokens each of them sees")

    def merge(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        given = signature.bind(*arguments, **keywords).arguments
        tokens, types_BS = given["hidden_states"].shape[:-1], given.get(EXPERT_TYPES)
        is_image_T = (torch.zeros(tokens) if types_BS is None else types_BS).reshape(-1) != 0
        masks = (~is_image_T, is_image_T)
        seen = [sum(len(one.output[0]) for one in own) for own in found]
        if seen != [int(mask_T.sum()) for mask_T in masks]:
            raise RoutingError(f"the routers of {block} saw {seen[0]} and {seen[1]} tokens, but their types say otherwise")
        called = [(place, own.pop()) for place, own in enumerate(found) if own]
        output, evidence = (
            _side_by_side([(place, getattr(one, kind), masks[place]) for place, one in called]) for kind in ("output", "evidence")
        )
        passes.append(Pass(block, output, evidence, ours=False))

    return merge


def _side_by_side(found: Sequence[tuple[int, Parts, Tensor]]) -> Parts:
    """Return the parts of all tokens, [T, 2E] or [T, K]. `found`: the place of a router, 0 or 1, its parts, and the mask of its tokens."""
    (_, first, mask_T), *_ = found
    tokens, experts = len(mask_T), first[0].shape[1]
    logits = first[0].new_full((tokens, 2 * experts), -torch.inf)
    weights, ids, dropped = (part.new_zeros(tokens, part.shape[1]) for part in first[1:])
    for place, parts, mask_T in found:
        mask_T = mask_T.to(logits.device)
        logits[mask_T, place * experts : (place + 1) * experts] = parts[0]
        weights[mask_T], ids[mask_T], dropped[mask_T] = parts[1], parts[2] + place * experts, parts[3]
    return logits, weights, ids, dropped
