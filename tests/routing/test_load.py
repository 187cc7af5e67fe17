import pytest
import torch

from moe_llava.routing.counts import expert_counts, expert_shares, whole_percents


def test_counts_and_shares():
    counts = expert_counts([torch.tensor([[0, 1], [1, 2]]), torch.zeros(3, 2, dtype=torch.long)], 4)
    assert counts.tolist() == [[1, 2, 1, 0], [6, 0, 0, 0]]
    assert expert_shares(counts)[0].tolist() == [0.25, 0.5, 0.25, 0.0]
    assert expert_shares(torch.zeros(1, 3, dtype=torch.long)).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("shares", "percents"),
    [
        ([0.255, 0.255, 0.255, 0.235], [26, 26, 25, 23]),
        ([1 / 3, 1 / 3, 1 / 3], [34, 33, 33]),
        ([0.146, 0.146, 0.146, 0.562], [15, 15, 14, 56]),
        ([1.0, 0.0], [100, 0]),
        ([0.0, 0.0], [0, 0]),
        ([0.125] * 8, [13, 13, 13, 13, 12, 12, 12, 12]),
    ],
)
def test_whole_percents_add_up(shares, percents):
    assert whole_percents(shares) == percents
