import torch

from moe_llava.routing.load import expert_counts, expert_shares


def test_counts_and_shares():
    logits = (torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [9.0, 9.0, 0.0]]), torch.zeros(3, 3))
    counts = expert_counts(logits, 2, torch.tensor([True, True, False]))
    assert counts[0].tolist() == [1, 2, 1]
    assert counts.sum(-1).tolist() == [4, 4]
    assert expert_shares(counts)[0].tolist() == [0.25, 0.5, 0.25]
    assert expert_shares(torch.zeros(1, 3, dtype=torch.long)).tolist() == [[0.0, 0.0, 0.0]]
