"""The labels of a batch: where they are predicted, and in which order.

Shapes: B rows, S sequence, K positions, N labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_llava.common.errors import DataError
from moe_llava.model.losses import IGNORED, next_labels


def logits_at_labels(labels_BS: Tensor) -> dict[str, Tensor]:
    """Return arguments with which transformers' own models compute logits only at the positions [K] where any row has a label, for the same
    loss: `logits_to_keep` [K] and `shift_labels` [B, K]. A sparse model does so by itself, row by row."""
    targets_BS = next_labels(labels_BS)
    labelled = (targets_BS != IGNORED).any(dim=0).nonzero().squeeze(1)
    return {"logits_to_keep": labelled, "shift_labels": targets_BS.index_select(1, labelled)}


def predicted(labels_S: Tensor) -> Tensor:
    """Return the labels [N] of a row that a token before predicts."""
    return labels_S[1:][labels_S[1:] != IGNORED]


def count_shared(own_N: Tensor, others: Tensor, source: str, other: str) -> int:
    """Return N, the number of labels of a model, with which the labels of `other` begin. Raises DataError if they do not."""
    first = others[: len(own_N)]
    if not torch.equal(first, own_N):
        at = next(index for index in range(len(own_N)) if index == len(first) or first[index] != own_N[index])
        found = f"{other} has only {at} labels" if at == len(first) else f"token {int(first[at])} to {other}"
        raise DataError(f"{source}: label {at} of its answers is token {int(own_N[at])} to the model, but {found}")
    return len(own_N)
