"""What is counted over the tokens of all processes of a run: sums, and the bias that keeps the load of the experts even.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce
from transformers import initialization as init


def sum_over_processes(sums: Tensor) -> Tensor:
    """Return the sum over the processes of a run, each of which has a part of the batch; without other processes the input. A gradient is
    summed over the processes, too."""
    if distributed.is_available() and distributed.is_initialized():
        return all_reduce(sums)
    return sums


class Float32Buffers(nn.Module):
    """A module whose buffers are float32 in every model: half precision would round their small steps to zero."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply `to` and similar: change the device, never the dtype."""

        def apply(buffer: Tensor) -> Tensor:
            changed = fn(buffer)
            return changed if changed.dtype == buffer.dtype else buffer.to(changed.device)

        return super()._apply(apply, recurse)


class LoadBias(Float32Buffers):
    """The bias that a router adds to the probabilities when it selects experts, not when it weights them (arXiv 2408.15664, algorithm 1).

    Buffer: `bias` [E]. `counts` [E] are the assignments since the last update, in this process; a forward pass does not add to them, so
    gradient checkpointing cannot count a token twice.
    """

    bias: Tensor

    def __init__(self, num_experts: int, rate: float):
        super().__init__()
        self.rate = rate
        self.counts: Tensor | None = None
        self.register_buffer("bias", torch.empty(num_experts, dtype=torch.float32))
        self.reset()

    def reset(self) -> None:
        """Set the initial values, except of a buffer that a checkpoint has filled."""
        init.zeros_(self.bias)

    def count(self, ids_TK: Tensor, token_mask_T: Tensor | None) -> None:
        """Add the assignments of a forward pass; those of padding, False in the mask, do not count."""
        chosen_NK = ids_TK if token_mask_T is None else ids_TK[token_mask_T.to(ids_TK.device)]
        counts_E = torch.bincount(chosen_NK.flatten(), minlength=self.bias.shape[0]).float()
        self.counts = counts_E if self.counts is None else self.counts + counts_E

    @torch.no_grad()
    def update(self, load_E: Tensor) -> None:
        """Move the bias of each expert by `rate` against its load, the assignments of a step in all processes."""
        self.bias += self.rate * torch.sign(load_E.mean() - load_E).to(self.bias.device)
        self.counts = None
