"""The engine's cache: the keys and values of its rows, with spare columns for the next tokens, and the states of linear attention.

Every layer can append the rows of another cache (`join`), and keep some of its rows (`keep`).

transformers' DynamicCache copies all keys and values for every token, which costs more and more of a step as prompts and batches grow; its
StaticCache attends to all columns, used or not.

Shapes: B rows, H heads, S columns, W head width, C all keys and values of a token: 2 H W, summed over the layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

SPARE = 16  # columns that are allocated ahead: one copy for so many tokens
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that keep keys and values
LINEAR_ATTENTION = "linear_attention"  # layers whose states do not grow with the tokens


class PreallocatedLayer(DynamicLayer):
    """A layer whose `keys` and `values` [B, H, S, W] are the first columns of larger tensors."""

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Replace all keys and values."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values
        self._all_keys, self._all_values = keys, values  # spare columns are allocated for the next token

    def join(self, other: PreallocatedLayer, columns: int) -> None:
        """Append the rows of `other`, both padded on the left to `columns`."""
        self.replace(
            torch.cat([_pad_left(self.keys, columns), _pad_left(other.keys, columns)]),
            torch.cat([_pad_left(self.values, columns), _pad_left(other.values, columns)]),
        )

    def keep(self, rows: Tensor | slice, columns: int) -> None:
        """Keep these rows, and the last `columns`."""
        self.replace(self.keys[rows, :, -columns:], self.values[rows, :, -columns:])

    def select(self, columns_BS: Tensor) -> None:
        """Replace the columns of each row by those of these indices."""
        index_BHSW = columns_BS[:, None, :, None]
        self.replace(
            self.keys.take_along_dim(index_BHSW, dim=2),
            self.values.take_along_dim(index_BHSW, dim=2),
        )

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


class StateLayer(LinearAttentionLayer):
    """A layer of linear attention: a state of constant size for each row. Padding on the left does not change it, because it is masked."""

    def join(self, other: StateLayer, columns: int) -> None:
        """Append the rows of `other`."""
        for states, others in ((self.conv_states, other.conv_states), (self.recurrent_states, other.recurrent_states)):
            states.update({index: torch.cat([state, others[index]]) for index, state in states.items()})

    def keep(self, rows: Tensor | slice, columns: int) -> None:
        """Keep these rows."""
        for states in (self.conv_states, self.recurrent_states):
            states.update({index: state[rows] for index, state in states.items()})


def preallocated_cache(config: PreTrainedConfig) -> Cache:
    """Return an empty cache for a model's text config. Layers with a sliding window keep all columns, to be padded like the others.

    Raises ValueError if a layer has states of another kind.
    """
    types = getattr(config, "layer_types", None) or []
    if unknown := sorted(set(types) - ATTENTION - {LINEAR_ATTENTION}):
        raise ValueError(f"{config.model_type} has layers of {', '.join(unknown)}, whose states the engine cannot batch")
    if not has_states(config):
        return Cache(layer_class_to_replicate=PreallocatedLayer)  # a layer that shares another's keys and values needs none
    return Cache(layers=[StateLayer() if kind == LINEAR_ATTENTION else PreallocatedLayer() for kind in types])


def has_states(config: PreTrainedConfig) -> bool:
    """Return whether a layer has states of linear attention: they hold whole prompts, not their tokens."""
    return LINEAR_ATTENTION in (getattr(config, "layer_types", None) or [])


def is_causal(config: PreTrainedConfig) -> bool:
    """Return whether no token of text attends to later ones. Those of PaliGemma do, within a prompt."""
    return getattr(config, "use_bidirectional_attention", None) not in (True, "all")


def states_of(cache: Cache, row: int, padding: int, tokens: slice) -> Tensor:
    """Return [S, C]: a copy of the keys and values of some `tokens` of a row after its `padding`, of all layers."""
    columns = slice(padding + tokens.start, padding + tokens.stop)
    return torch.cat([states[row, :, columns].transpose(0, 1).flatten(1) for states in _keys_and_values(cache)], dim=1)


def shapes_of(cache: Cache) -> list[tuple[int, int]]:
    """Return (H, W) of the keys, and of the values, of each layer."""
    return [(states.shape[1], states.shape[3]) for states in _keys_and_values(cache)]


def cache_of(rows: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> Cache:
    """Return a cache of rows, each with the states [S, C] of its tokens, padded on the left. `shapes`: see `shapes_of`."""
    states_BSC = pad_sequence(list(rows), batch_first=True, padding_side="left")
    parts = [
        part_BSC.unflatten(2, shape).transpose(1, 2)
        for part_BSC, shape in zip(states_BSC.split([heads * width for heads, width in shapes], dim=2), shapes, strict=True)
    ]
    cache = Cache(layers=[PreallocatedLayer() for _ in shapes[::2]])
    for layer, keys, values in zip(cache.layers, parts[::2], parts[1::2], strict=True):
        layer.replace(keys, values)
    return cache


def window_of(config: PreTrainedConfig) -> float:
    """Return the most columns that every layer attends to, infinite without sliding windows."""
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((size for size in sizes if size), default=math.inf)


def _keys_and_values(cache: Cache) -> list[Tensor]:
    return [states for layer in cache.layers for states in (layer.keys, layer.values)]


def _pad_left(states: Tensor, columns: int) -> Tensor:
    """Return [B, H, S, W] with zeros before, up to `columns`."""
    return F.pad(states, (0, 0, columns - states.shape[2], 0))


def _enlarged(states: Tensor, columns: int) -> Tensor:
    enlarged = states.new_empty(*states.shape[:2], columns, states.shape[3])
    enlarged.narrow(2, 0, states.shape[2]).copy_(states)
    return enlarged
