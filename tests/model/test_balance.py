"""Balancing of the load: over which tokens, and by a bias of the selection."""

import copy

import pytest
import torch

from moe_llava import upcycle
from moe_llava.model.balance import LoadBias
from moe_llava.model.losses import balance_loss
from tests.conftest import tiny_dense, tiny_inputs
from tests.model.test_equivalences import labels_of, shuffled_sparse
from tests.model.test_moe import router


def test_a_loss_per_sequence_is_the_mean_over_rows_with_tokens():
    logits_TE = torch.randn(12, 4)
    rows = [balance_loss((row,)).item() for row in logits_TE.view(3, 4, 4)]
    assert balance_loss((logits_TE,), rows=3).item() == pytest.approx(sum(rows) / 3)
    mask_T = torch.tensor([True] * 4 + [False] * 4 + [True] * 2 + [False] * 2)
    last = balance_loss((logits_TE[8:10],)).item()
    assert balance_loss((logits_TE,), mask_T, rows=3).item() == pytest.approx((rows[0] + last) / 2)


def test_the_option_selects_the_tokens():
    inputs = tiny_inputs(batch=3)
    losses = {}
    for over in ("step", "process", "sequence"):
        model = shuffled_sparse("llama", balance_over=over)
        found = model(**inputs, labels=labels_of(inputs), output_router_logits=True)
        losses[over] = found.aux_loss.item()
        assert model.balance_loss(found.router_logits, rows=3).item() == losses[over]
        logits = found.router_logits
    assert losses["step"] == losses["process"] == pytest.approx(balance_loss(logits).item())
    assert losses["sequence"] == pytest.approx(balance_loss(logits, rows=3).item())
    assert losses["sequence"] > losses["step"]  # uneven in each row, more even over all


def test_padding_gets_no_gradient_whatever_it_computes():
    logits_TE = torch.randn(6, 4)
    logits_TE[4:] = torch.nan
    logits_TE.requires_grad_()
    balance_loss((logits_TE,), torch.tensor([True] * 4 + [False] * 2)).backward()
    assert logits_TE.grad.isfinite().all()
    assert logits_TE.grad[4:].eq(0).all()


def test_the_bias_decides_which_experts_are_chosen_not_what_they_weigh():
    x_TD, weight_ED = torch.randn(6, 3), torch.randn(4, 3)
    biased = router(weight_ED, router_bias_rate=0.5)
    biased.load_bias.bias[2] = 2.0
    probs_TE = (x_TD @ weight_ED.T).softmax(-1)
    _, weights_TK, ids_TK, _ = biased(x_TD)
    assert ids_TK[:, 0].eq(2).all()
    chosen_TK = probs_TE.gather(-1, ids_TK)
    torch.testing.assert_close(weights_TK, chosen_TK / chosen_TK.sum(-1, keepdim=True))
    without = router(weight_ED)(x_TD)[2]
    biased.load_bias.reset()
    assert torch.equal(biased(x_TD)[2], without)


def test_the_bias_moves_against_the_load():
    bias = LoadBias(4, rate=0.25)
    ids_TK = torch.tensor([[0, 1], [0, 1], [0, 2], [3, 3]])
    bias.count(ids_TK, torch.tensor([True, True, True, False]))
    assert bias.counts.tolist() == [3, 2, 1, 0]
    bias.count(ids_TK[3:], None)
    assert bias.counts.tolist() == [3, 2, 1, 2]
    bias.update(bias.counts)
    assert bias.bias.tolist() == [-0.25, 0, 0.25, 0]
    assert bias.counts is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_load_of_a_step_is_counted_once_in_training_alone(checkpointing):
    inputs = tiny_inputs()
    labels = labels_of(inputs)
    sparse = upcycle(tiny_dense("llama"), router_bias_rate=0.1)
    bias = sparse.sparse_mlps()[0].router.load_bias
    sparse(**inputs, labels=labels, output_router_logits=True)
    assert bias.counts is None
    sparse.train()
    if checkpointing:
        sparse.gradient_checkpointing_enable()
    for _ in range(2):  # as with gradient accumulation
        sparse(**inputs, labels=labels).loss.backward()
    assert bias.counts.sum() == 2 * 2 * inputs["input_ids"].numel()
    assert bias.bias.eq(0).all()
    sparse.update_router_bias()
    assert bias.bias.abs().max() == pytest.approx(0.1)
    before = copy.deepcopy(bias.bias)
    sparse.update_router_bias()  # nothing was counted since
    assert torch.equal(bias.bias, before)


def test_the_bias_evens_the_load_without_a_loss():
    """Tokens that all want the same experts are spread when the bias has moved for some steps."""
    torch.manual_seed(0)
    biased = router(torch.randn(4, 8), num_experts_per_tok=1, router_bias_rate=0.002)
    x_TD = torch.randn(400, 8) + torch.randn(8)

    def load():
        return torch.bincount(biased(x_TD)[2].flatten(), minlength=4)

    first = load()
    for _ in range(400):
        biased.load_bias.update(load().float())
    assert load().max() < first.max() / 2
    assert load().min() > 4 * first.min()
