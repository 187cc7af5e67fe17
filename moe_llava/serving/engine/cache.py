"""Keys and values of the engine's rows, with spare columns for the next tokens.

transformers' DynamicCache copies all keys and values for every token, which costs more and more of a step as prompts and batches grow; its
StaticCache attends to all columns, used or not.

Shapes: B rows, H heads, S columns, W head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

SPARE = 16  # columns that are allocated ahead: one copy for so many tokens


class PreallocatedLayer(DynamicLayer):
    """A layer whose `keys` and `values` [B, H, S, W] are the first columns of larger tensors."""

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Replace all keys and values."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values
        self._all_keys, self._all_values = keys, values  # spare columns are allocated for the next token

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.replace(key_states, value_states)
            return key_states, value_states
        start = self.keys.shape[2]
        columns = start + key_states.shape[2]
        if columns > self._all_keys.shape[2]:
            self._all_keys, self._all_values = _enlarged(self.keys, columns + SPARE), _enlarged(self.values, columns + SPARE)
        self._all_keys.narrow(2, start, key_states.shape[2]).copy_(key_states)
        self._all_values.narrow(2, start, key_states.shape[2]).copy_(value_states)
        self.keys, self.values = self._all_keys.narrow(2, 0, columns), self._all_values.narrow(2, 0, columns)
        return self.keys, self.values


def preallocated_cache() -> Cache:
    """Return an empty cache. Layers with a sliding window keep all columns, too, so they can be padded like the others."""
    return Cache(layer_class_to_replicate=PreallocatedLayer)


def _enlarged(states: Tensor, columns: int) -> Tensor:
    enlarged = states.new_empty(*states.shape[:2], columns, states.shape[3])
    enlarged.narrow(2, 0, states.shape[2]).copy_(states)
    return enlarged
