"""Router, losses and capacity against the formulas, worked by hand or written out plainly."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_llava.model.configuration import MoeLlavaConfig
from moe_llava.model.losses import balance_loss, z_loss
from moe_llava.model.moe import GatedExperts, Router, SparseMlp
from moe_llava.model.upcycling import upcycle
from tests.conftest import tiny_config, tiny_dense, tiny_inputs
from tests.model.test_equivalences import labels_of, shuffled_sparse


def config(**settings) -> MoeLlavaConfig:
    dense = tiny_config("llama").to_dict()
    dense.pop("model_type")
    return MoeLlavaConfig(**dense, **settings)


def router(weight: torch.Tensor, **settings) -> Router:
    built = Router(config(num_experts=weight.shape[0], **settings), weight.shape[1])
    with torch.no_grad():
        built.weight.copy_(weight)
    return built


def test_router_weights_are_the_chosen_probabilities():
    x_TD, weight_ED = torch.randn(6, 3), torch.randn(4, 3)
    probs_TE = (x_TD @ weight_ED.T).softmax(-1)
    top_TK, expected_ids_TK = probs_TE.topk(2)
    logits_TE, weights_TK, ids_TK, dropped_TK = router(weight_ED, norm_topk_prob=False)(x_TD)
    torch.testing.assert_close(logits_TE, x_TD @ weight_ED.T)
    torch.testing.assert_close(weights_TK, top_TK)
    assert torch.equal(ids_TK, expected_ids_TK)
    assert not dropped_TK.any()
    _, normalised_TK, _, _ = router(weight_ED)(x_TD)
    torch.testing.assert_close(normalised_TK, top_TK / top_TK.sum(-1, keepdim=True))


def test_router_computes_in_float32_under_autocast():
    x_TD, weight_ED = torch.randn(6, 64), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits_TE, weights_TK, _, _ = router(weight_ED)(x_TD)
    assert logits_TE.dtype == weights_TK.dtype == torch.float32
    torch.testing.assert_close(logits_TE, x_TD @ weight_ED.T)


def test_sparse_mlp_is_the_weighted_sum_of_its_experts():
    settings = config()
    mlp = SparseMlp(Router(settings, 8), GatedExperts(settings, 8, 12, F.silu))
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    x_BSD = torch.randn(2, 5, 8)
    expected = torch.zeros(10, 8)
    for token, x_D in enumerate(x_BSD.view(10, 8)):
        p_E = (mlp.router.weight @ x_D).softmax(0)
        chosen = p_E.topk(2).indices.tolist()
        for expert in chosen:
            gate_F, up_F = (mlp.experts.gate_up_proj[expert] @ x_D).chunk(2)
            expected[token] += p_E[expert] / p_E[chosen].sum() * (mlp.experts.down_proj[expert] @ (F.silu(gate_F) * up_F))
    torch.testing.assert_close(mlp(x_BSD).view(10, 8), expected)


def test_balance_loss_worked_by_hand():
    # Two tokens of three experts; first choices 0 and 2; probabilities (1/2, 1/4, 1/4) and (1/8, 1/8, 3/4).
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]).log()
    f, p = (0.5, 0.0, 0.5), (0.3125, 0.1875, 0.5)
    expected = 3 * sum(a * b for a, b in zip(f, p, strict=True))
    assert balance_loss((logits,)).item() == pytest.approx(expected)
    assert balance_loss((logits, logits)).item() == pytest.approx(2 * expected)
    assert balance_loss((torch.zeros(8, 4),)).item() == pytest.approx(1.0)


def test_z_loss_worked_by_hand():
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert z_loss((logits,)).item() == pytest.approx(expected)
    assert z_loss((logits, logits)).item() == pytest.approx(2 * expected)


def test_padding_counts_in_no_loss():
    logits, garbage = torch.randn(6, 4), torch.full((3, 4), 50.0)
    mask = torch.tensor([True] * 6 + [False] * 3)
    padded = (torch.cat([logits, garbage]),)
    torch.testing.assert_close(balance_loss(padded, mask), balance_loss((logits,)), rtol=1e-6, atol=0)
    assert z_loss(padded, mask) == z_loss((logits,))


def test_loss_is_cross_entropy_plus_weighted_losses():
    sparse = shuffled_sparse("llama", router_aux_loss_coef=0.3, router_z_loss_coef=0.2)
    inputs = tiny_inputs()
    labels = labels_of(inputs)
    plain = sparse(**inputs, labels=labels)
    assert plain.aux_loss is None
    assert plain.router_logits is None
    full = sparse(**inputs, labels=labels, output_router_logits=True)
    logits = full.logits[:, :-1].reshape(-1, 99)
    torch.testing.assert_close(plain.loss, F.cross_entropy(logits, labels[:, 1:].reshape(-1)))
    torch.testing.assert_close(full.loss, plain.loss + 0.3 * full.aux_loss + 0.2 * full.z_loss)
    torch.testing.assert_close(full.aux_loss, balance_loss(full.router_logits))
    # While training, the auxiliary losses are learnt from whether or not the logits are asked for.
    torch.testing.assert_close(sparse.train()(**inputs, labels=labels).loss, full.loss)


def test_top_one_unnormalised_is_the_published_form():
    dense = tiny_dense("llama")
    inputs = tiny_inputs()
    sparse = upcycle(dense, num_experts_per_tok=1, norm_topk_prob=False)
    router_ = sparse.sparse_mlps()[0].router
    _, weights_TK, _, _ = router_(torch.randn(5, 32))
    assert (weights_TK < 1).all()
    assert (sparse(**inputs).logits - dense(**inputs).logits).abs().max() > 1e-3


class TestCapacity:
    def route(self, first: list[int], factor: float, mask: torch.Tensor | None = None, **settings):
        """Tokens whose first choice is `first` and whose second is the next expert of 4."""
        x_TD = F.one_hot(torch.tensor(first), 4) * 2.0 + F.one_hot((torch.tensor(first) + 1) % 4, 4)
        built = router(torch.eye(4), capacity_factor=factor, **settings)
        return built(x_TD, mask)

    def test_tokens_beyond_the_capacity_are_dropped_in_order(self):
        # 8 tokens, k = 1, E = 4, factor 1: two places each. Five tokens want expert 0.
        *_, dropped = self.route([0, 0, 0, 0, 0, 1, 2, 3], 1.0, num_experts_per_tok=1)
        assert dropped.squeeze(-1).tolist() == [False, False, True, True, True, False, False, False]

    def test_first_choices_go_before_second_ones(self):
        # 4 tokens, k = 2, factor 1: two places each. Token 0 wants 0 then 1; tokens 1 and 2 want 1 first, so its second choice is full.
        _, weights, ids, dropped = self.route([0, 1, 1, 2], 1.0)
        assert ids[0].tolist() == [0, 1]
        assert dropped[0].tolist() == [False, True]
        assert weights[0].tolist() == [1.0, 0.0]  # renormalised after the drop
        torch.testing.assert_close(weights[1].sum(), torch.tensor(1.0))

    def test_dropped_weights_stay_zero_without_renormalising(self):
        _, weights, _, dropped = self.route([0, 0, 0, 0], 0.5, norm_topk_prob=False)
        assert dropped.any(dim=0).all()
        assert (weights[dropped] == 0).all()
        assert (weights.sum(-1) < 1).all()

    def test_a_token_that_loses_every_expert_gets_nothing(self):
        settings = config(num_experts_per_tok=1, capacity_factor=0.5)
        mlp = SparseMlp(Router(settings, 8), GatedExperts(settings, 8, 12, F.silu))
        for parameter in mlp.parameters():
            nn.init.normal_(parameter)
        x = torch.ones(1, 8, 8)  # all want the same expert; it takes ceil(8 / 4 * 0.5) = 1
        y = mlp(x)[0]
        assert (y[0] != 0).any()
        assert (y[1:] == 0).all()

    def test_places_are_counted_exactly(self):
        # 25 tokens * 1 * 1.2 / 2 experts are 15 places; in float32 the product is a hair above.
        built = router(torch.eye(2), num_experts_per_tok=1, capacity_factor=1.2)
        *_, dropped = built(torch.tensor([[1.0, 0.0]] * 25))
        assert int((~dropped).sum()) == 15

    def test_padding_takes_no_place(self):
        mask = torch.tensor([False, False, True, True, True, True])
        *_, dropped = self.route([0, 0, 0, 1, 2, 3], 1.0, mask, num_experts_per_tok=1)
        assert not dropped.any()
        *_, dropped = self.route([0, 0, 0, 0, 2, 3], 1.0, mask, num_experts_per_tok=1)
        assert dropped.squeeze(-1).tolist() == [False, False, False, True, False, False]

    def test_a_generous_factor_drops_nothing(self):
        *_, dropped = self.route([0] * 16, 4.0, num_experts_per_tok=1)
        assert not dropped.any()

    def test_the_model_hands_the_mask_down_and_counts_drops(self):
        sparse = shuffled_sparse("llama", capacity_factor=1.0)
        alone = tiny_inputs(batch=1)
        padded = {**alone}
        padded["input_ids"] = F.pad(alone["input_ids"], (0, 6))
        padded["attention_mask"] = F.pad(alone["attention_mask"], (0, 6))
        expected, got = (sparse(**inputs, output_router_logits=True) for inputs in (alone, padded))
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(got.logits[:, :length], expected.logits, atol=2e-5, rtol=1e-5)
        assert sum(int(drops.sum()) for drops in expected.router_drops) > 0
        for a, b in zip(expected.router_drops, got.router_drops, strict=True):
            assert torch.equal(a, b[:length])
            assert not b[length:].any()

    def test_a_mask_of_another_length_is_an_error(self):
        with pytest.raises(RuntimeError, match="got 4 tokens, but its token mask has 3"):
            self.route([0, 1, 2, 3], 1.0, torch.ones(3, dtype=torch.bool))
