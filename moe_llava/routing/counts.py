"""Count the tokens that each expert takes.

Shapes: T tokens, E experts, K experts per token, L MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def expert_counts(router_choices: Sequence[Tensor], num_experts: int) -> Tensor:
    """Return [L, E]: how many tokens use each expert. `router_choices`: per layer [T, K]; T may differ."""
    return torch.stack([torch.bincount(ids_TK.flatten(), minlength=num_experts) for ids_TK in router_choices])


def expert_shares(counts_LE: Tensor) -> Tensor:
    """Return [L, E]: each expert's share of its layer's assignments; 0 in a layer without any."""
    return counts_LE / counts_LE.sum(dim=-1, keepdim=True).clamp(min=1)


def whole_percents(shares_E: Sequence[float]) -> list[int]:
    """Round shares that sum to 1 to whole percents that sum to 100: the largest remainders are rounded up. All 0 stays 0."""
    percents = [100 * share for share in shares_E]
    whole = [math.floor(percent) for percent in percents]
    by_remainder = sorted(range(len(percents)), key=lambda place: whole[place] - percents[place])
    for place in by_remainder[: round(sum(percents)) - sum(whole)]:
        whole[place] += 1
    return whole
