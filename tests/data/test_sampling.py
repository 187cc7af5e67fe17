"""The order of an epoch: every record once, one modality and similar lengths in a batch, and the same order from the same seed."""

import numpy as np
import pytest

from moe_llava.data.batches import GroupedSampler

RANDOM = np.random.default_rng(0)
LENGTHS = RANDOM.integers(10, 2000, 1000)
HAS_IMAGE = RANDOM.random(1000) < 0.7


def batches(sampler, size):
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_has_one_modality_and_about_one_length(monkeypatch, processes):
    monkeypatch.setattr("moe_llava.data.batches.POOL", 16)
    sampler = GroupedSampler(LENGTHS, HAS_IMAGE, 4 * processes, 4, processes, seed=3)
    assert sorted(sampler) == list(range(1000))
    at_once = 4 * processes
    found = batches(sampler, at_once)
    mixed = [batch for batch in found if len({HAS_IMAGE[index] for index in batch}) > 1]
    assert all(batch in found[-2:] for batch in mixed)
    padding = 1 - LENGTHS.sum() / sum(LENGTHS[batch].max() * len(batch) for batch in found)
    assert padding < 0.12
    shuffled = RANDOM.permutation(1000)
    random_padding = 1 - LENGTHS.sum() / sum(LENGTHS[batch].max() * len(batch) for batch in np.array_split(shuffled, len(found)))
    assert random_padding > 0.3
    longest = [LENGTHS[batch].max() for batch in found]
    assert abs(np.corrcoef(longest, range(len(found)))[0, 1]) < 0.2  # batches themselves come in random order


def test_processes_share_a_batch_evenly():
    sampler = GroupedSampler(np.arange(64), np.ones(64, bool), 8, 4, 2, seed=0)
    for first, second in zip(*[iter(batches(sampler, 4))] * 2, strict=True):
        assert abs(sum(first) - sum(second)) == 4
        assert max(first + second) - min(first + second) == 7


def test_the_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        sampler = GroupedSampler(LENGTHS, HAS_IMAGE, 4, 4, 1, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1) != order(1, 1)
    # What a step sees does not depend on how it is shared out.
    one = GroupedSampler(LENGTHS, HAS_IMAGE, 16, 16, 1, seed=0)
    two = GroupedSampler(LENGTHS, HAS_IMAGE, 16, 4, 2, seed=0)
    assert [set(batch) for batch in batches(one, 16)] == [set(batch) for batch in batches(two, 16)]
    assert len(one) == 1000


def test_fewer_records_than_a_batch():
    sampler = GroupedSampler(np.array([3, 1, 2]), np.array([True, False, True]), 8, 4, 2, seed=0)
    assert sorted(sampler) == [0, 1, 2]
