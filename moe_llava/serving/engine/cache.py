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

SPARE = 16  # columns: so many tokens are written between two copies


class RoomyLayer(DynamicLayer):
    """A layer whose `keys` and `values` [B, H, S, W] are the first columns of tensors with more of them. `hold` replaces them."""

    def hold(self, keys: Tensor, values: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values
        self._roomy_keys, self._roomy_values = keys, values  # there is no room until a token comes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.hold(key_states, value_states)
            return key_states, value_states
        start = self.keys.shape[2]
        columns = start + key_states.shape[2]
        if columns > self._roomy_keys.shape[2]:
            self._roomy_keys, self._roomy_values = _with_room(self.keys, columns + SPARE), _with_room(self.values, columns + SPARE)
        self._roomy_keys.narrow(2, start, key_states.shape[2]).copy_(key_states)
        self._roomy_values.narrow(2, start, key_states.shape[2]).copy_(value_states)
        self.keys, self.values = self._roomy_keys.narrow(2, 0, columns), self._roomy_values.narrow(2, 0, columns)
        return self.keys, self.values


def roomy_cache() -> Cache:
    """Return an empty cache. Layers with a sliding window keep all columns, too, so they can be padded like the others."""
    return Cache(layer_class_to_replicate=RoomyLayer)


def _with_room(states: Tensor, columns: int) -> Tensor:
    roomy = states.new_empty(*states.shape[:2], columns, states.shape[3])
    roomy.narrow(2, 0, states.shape[2]).copy_(states)
    return roomy
