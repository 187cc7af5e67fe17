"""The labels of a row, and of the same row for another tokenizer.

Shapes: S sequence, N labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_llava.common.errors import DataError
from moe_llava.model.losses import IGNORED


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
