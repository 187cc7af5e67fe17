"""The cache holds what transformers' own growing cache holds, token by token."""

import pytest
import torch
from transformers import Cache, DynamicCache, PreTrainedConfig

from moe_llava.serving.engine.batch import Batch
from moe_llava.serving.engine.cache import SPARE, PreallocatedLayer, StateLayer, preallocated_cache


def states(rows, columns):
    return torch.randn(rows, 2, columns, 4)


def write(caches, rows, columns):
    """The same columns for each of two layers; what attention gets to see must agree."""
    for layer in range(2):
        keys, values = states(rows, columns), states(rows, columns)
        plain, preallocated = [cache.update(keys, values, layer) for cache in caches]
        assert all(torch.equal(*pair) for pair in zip(plain, preallocated, strict=True))
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    assert caches[0].get_mask_sizes(1, 0) == caches[1].get_mask_sizes(1, 0)


@pytest.fixture
def caches():
    torch.manual_seed(0)
    return DynamicCache(), preallocated_cache(PreTrainedConfig())


def test_it_grows_beyond_its_room(caches):
    write(caches, 3, 5)
    for columns in [1] * (SPARE + 3) + [SPARE + 7, 1, 1]:
        write(caches, 3, columns)


def test_rows_and_columns_leave(caches):
    write(caches, 4, 9)
    write(caches, 4, 1)
    plain, preallocated = caches
    for layer in plain.layers:
        layer.keys, layer.values = layer.keys[[0, 2], :, -6:], layer.values[[0, 2], :, -6:]
    for layer in preallocated.layers:
        layer.keep(torch.tensor([0, 2]), 6)
    write(caches, 2, 1)
    write(caches, 2, 1)
    assert caches[1].get_seq_length() == 8


def test_a_token_is_written_in_place(caches):
    _, preallocated = caches
    keys, _ = preallocated.update(states(1, 5), states(1, 5), 0)
    before, places = keys.clone(), []
    for _ in range(SPARE + 2):
        keys, _ = preallocated.update(states(1, 1), states(1, 1), 0)
        places.append(keys.data_ptr())
    assert len(set(places)) == 2  # copied when it got room, and when that was used up
    assert torch.equal(keys[:, :, :5], before)


def test_a_batch_stays_as_it_was_when_rows_cannot_join():
    """The last of three layers fails between its two states."""

    def cache_of(rows, columns, width):
        layers = [PreallocatedLayer(), StateLayer(), StateLayer()]
        layers[0].replace(states(rows, columns), states(rows, columns))
        for layer in layers[1:]:
            layer.conv_states[0], layer.recurrent_states[0] = torch.randn(rows, 3, 4), torch.randn(rows, 3, 4)
        layers[2].recurrent_states[0] = torch.randn(rows, 3, width)
        return Cache(layers=layers)

    def tensors(cache):
        keys, *others = cache.layers
        return [keys.keys, keys.values, *(kind[0] for layer in others for kind in (layer.conv_states, layer.recurrent_states))]

    batch, cache = Batch(lambda: Cache(layers=[]), torch.device("cpu")), cache_of(2, 5, 4)
    batch.join(["first", "second"], cache, 5)
    before = [tensor.clone() for tensor in tensors(cache)]
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        batch.join(["third"], cache_of(1, 7, 9), 7)
    assert all(torch.equal(*pair) for pair in zip(tensors(batch.cache), before, strict=True))
    assert (batch.rows, batch.columns) == (["first", "second"], 5)
