"""Train a model whose experts are its family's own: the precision of its experts, and what its routers decide in a forward pass.

Shapes: T tokens, D width, L routers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_llava.data.encoder import EXPERT_TYPES
from moe_llava.model.losses import balance_loss
from moe_llava.routing.routers import RoutedExperts, RoutingError, logits_and_choice

Routed = dict[RoutedExperts, tuple[Tensor, Tensor]]

GROUPED, GROUPED_UNDER_AUTOCAST = "grouped_mm", "grouped_mm_under_autocast"  # names in transformers' registry


def follow_autocast(model: PreTrainedModel) -> None:
    """Make the experts compute in autocast's dtype. Autocast does not know grouped_mm, which computes in the dtype of the weights."""
    if model.config.get_text_config()._experts_implementation == GROUPED:  # its loop over the experts follows autocast by itself
        model.set_experts_implementation(GROUPED_UNDER_AUTOCAST)


def _grouped_under_autocast(experts: nn.Module, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    forward, device = ALL_EXPERTS_FUNCTIONS[GROUPED], x_TD.device.type
    if not torch.is_autocast_enabled(device):
        return forward(experts, x_TD, ids_TK, weights_TK)
    dtype = torch.get_autocast_dtype(device)
    return forward(_Cast(experts, dtype), x_TD.to(dtype), ids_TK, weights_TK).to(x_TD.dtype)  # ERNIE 4.5 VL takes no other


ALL_EXPERTS_FUNCTIONS.register(GROUPED_UNDER_AUTOCAST, _grouped_under_autocast)


class _Cast:
    """Experts as they are, but for parameters, which are cast."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype):
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value


@contextmanager
def recorded(model: nn.Module, groups: Sequence[RoutedExperts], inputs: Mapping[str, Tensor], mask_T: Tensor) -> Iterator[Routed]:
    """Yield a mapping that holds after a forward pass the logits [T, E] and the choices [T, K] of each router, without padding. A router
    that saw no token is left out.

    The choices are the router's own: a bias, or groups of experts, may decide beside the logits. `inputs`: the model's; `mask_T`: False for
    padding.
    """
    found: Routed = {}
    hooks = [
        model.get_submodule(group.router).register_forward_hook(_recording(found, group, *seen))
        for group, seen in _seen(groups, inputs.get(EXPERT_TYPES), mask_T).items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _seen(groups: Sequence[RoutedExperts], types: Tensor | None, mask_T: Tensor) -> dict[RoutedExperts, tuple[int, Tensor]]:
    """Return for each router how many tokens it sees, and the indices of those among them that are no padding. In a layer with several
    routers, each sees the tokens of one type. These are found once, not for each router: a GPU has to wait for their number."""
    masks: dict[bool | None, Tensor] = {None: mask_T}
    if types is not None:
        is_image_T = types.reshape(-1) != 0
        masks |= {False: mask_T[~is_image_T], True: mask_T[is_image_T]}
    seen = {kind: (len(mask), mask.nonzero().squeeze(1)) for kind, mask in masks.items()}
    layers = {group: [other for other in groups if other.layer == group.layer] for group in groups}
    return {group: seen[None if types is None or len(layer) == 1 else layer.index(group) > 0] for group, layer in layers.items()}


def _recording(found: Routed, group: RoutedExperts, number: int, kept: Tensor) -> Any:
    def record(router: nn.Module, arguments: Any, output: Any) -> None:
        logits_TE, ids_TK = (part.detach() for part in logits_and_choice(output, group))
        if len(ids_TK) != number:
            raise RoutingError(f"the router {group.router} saw {len(ids_TK)} tokens, where {number} were expected")
        if len(kept):
            found[group] = logits_TE[kept.to(logits_TE.device)], ids_TK[kept.to(ids_TK.device)]

    return record


@torch.no_grad()
def numbers(routed: Routed, groups: Sequence[RoutedExperts], device: torch.device) -> dict[str, Tensor]:
    """Return `counts_LE`, how many tokens each expert gets, and `balance_loss`, as of experts that are made here: summed over the routers,
    those that saw no token taken to be as balanced as the others."""
    counts_LE = torch.zeros(len(groups), groups[0].num_experts, dtype=torch.long, device=device)
    for counts_E, group in zip(counts_LE, groups, strict=True):
        if group in routed:
            ids = routed[group][1].flatten().to(device)
            counts_E.scatter_add_(0, ids, torch.ones_like(ids))  # bincount would wait for the GPU
    balance = balance_loss(tuple(logits for logits, _ in routed.values())) if routed else torch.zeros(())
    return {"counts_LE": counts_LE, "balance_loss": (balance * len(groups) / max(len(routed), 1)).to(device)}


def auxiliary_loss(outputs: Any, model: PreTrainedModel, device: torch.device) -> Tensor:
    """Return the auxiliary loss that a family's forward pass has added to its loss; 0 if there is none."""
    auxiliary = getattr(outputs, "aux_loss", None)
    if auxiliary is None:
        return torch.zeros((), device=device)
    return model.config.get_text_config().router_aux_loss_coef * auxiliary.to(device)
