"""What a token's modality says about its experts: what holds of split experts and of SMoES, and split experts themselves."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from moe_llava import MoeLlavaForConditionalGeneration, upcycle
from moe_llava.model.losses import balance_loss
from moe_llava.model.moe import Router
from tests.conftest import tiny_dense, tiny_inputs
from tests.model.test_equivalences import labels_of, shuffled_sparse
from tests.model.test_moe import config
from tests.model.test_smoes import learned, statistics_of

by_modality = pytest.mark.parametrize("routing", ["modality_split", "smoes"])


def chosen(outputs, layer: int = 0, top_k: int = 2) -> torch.Tensor:
    return outputs.router_logits[layer].topk(top_k).indices


# Both


@pytest.mark.parametrize("family", ["llama", "phi"])
@by_modality
@torch.no_grad()
def test_upcycled_computes_what_dense_computed(family, routing):
    dense = tiny_dense(family)
    inputs = tiny_inputs()
    expected = dense(**inputs).logits
    for use_residual in (False, True):
        sparse = upcycle(dense, routing=routing, use_residual=use_residual)
        assert (sparse(**inputs).logits - expected).abs().max() <= 1e-5


@by_modality
@torch.no_grad()
def test_saved_is_loaded_bitwise(routing, tmp_path):
    sparse = learned() if routing == "smoes" else shuffled_sparse("llama", routing=routing)
    sparse.save_pretrained(tmp_path)
    loaded, report = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    saved, got = sparse.state_dict(), loaded.state_dict()
    assert saved.keys() == got.keys()
    assert all(torch.equal(saved[name], got[name]) for name in saved)
    inputs = tiny_inputs()
    labels = labels_of(inputs)
    expected, found = (model(**inputs, labels=labels, output_router_logits=True) for model in (sparse, loaded))
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=0)
    assert loaded.config.routing == routing


@by_modality
@torch.no_grad()
def test_expert_backends_agree(routing):
    sparse = shuffled_sparse("llama", routing=routing)
    logits = {}
    for backend in ("eager", "grouped_mm", "batched_mm"):
        sparse.set_experts_implementation(backend)
        logits[backend] = sparse(**tiny_inputs()).logits
    torch.testing.assert_close(logits["grouped_mm"], logits["eager"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits["batched_mm"], logits["eager"], atol=1e-5, rtol=1e-5)


@by_modality
def test_gradient_checkpointing_changes_nothing(routing):
    inputs = tiny_inputs()
    gradients, statistics = [], []
    for checkpointing in (False, True):
        sparse = learned(router_mi_loss_coef=1.0) if routing == "smoes" else shuffled_sparse("llama", routing=routing)
        sparse.train()
        if checkpointing:
            sparse.gradient_checkpointing_enable()
        sparse(**inputs, labels=labels_of(inputs)).loss.backward()
        gradients.append({name: p.grad for name, p in sparse.named_parameters() if p.grad is not None})
        statistics.append(statistics_of(sparse))
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], msg=name)
    # Not counted twice, although the layers run twice.
    assert len(statistics[0]) == (6 if routing == "smoes" else 0)
    assert all(torch.equal(statistics[0][name], statistics[1][name]) for name in statistics[0])


@by_modality
def test_embeddings_alone_do_not_say_where_the_images_stand(routing):
    sparse = upcycle(tiny_dense("llama"), routing=routing)
    with pytest.raises(ValueError, match=f"routing {routing} needs the positions of the images: input_ids, or image_mask"):
        sparse(inputs_embeds=torch.randn(1, 3, 32), output_router_logits=True)


def test_the_image_mask_instead_of_token_ids():
    sparse, batch = upcycle(tiny_dense("llama"), routing="modality_split", expert_start="noise"), tiny_inputs()
    expected = sparse(**batch).logits
    embeddings = capture_embeddings(sparse, batch)
    mask = batch["input_ids"] == sparse.config.image_token_id
    inputs = {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}
    assert torch.equal(sparse(**inputs, image_mask=mask).logits, expected)
    assert torch.equal(sparse.model(**inputs, image_mask=mask).last_hidden_state, sparse.model(**batch).last_hidden_state)
    assert not torch.equal(sparse(**inputs, image_mask=~mask).logits, expected)


def capture_embeddings(sparse, batch):
    """The embeddings of a batch, with the features of its images."""
    found = []
    hook = sparse.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    sparse(**batch)
    hook.remove()
    return found[0]


def test_smoes_routes_embeddings_alone():
    """Serving engines pass embeddings, without token ids."""
    sparse, batch = upcycle(tiny_dense("llama"), routing="smoes"), tiny_inputs()
    embeddings = sparse.get_input_embeddings()(batch["input_ids"][:, -3:])
    assert torch.equal(sparse(inputs_embeds=embeddings).logits, sparse(input_ids=batch["input_ids"][:, -3:]).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routing": "split"}, "routing is 'split', but must be one of agnostic, modality_split, smoes"),
        ({"routing": "modality_split", "num_experts": 3, "num_experts_per_tok": 1}, "num_experts is 3, but must be even"),
        ({"routing": "modality_split", "num_experts_per_tok": 3}, r"num_experts_per_tok is 3, but must lie in 1\.\.2 for routing"),
        ({"routing": "smoes", "expert_bin_size": 3}, "expert_bin_size is 3, but must divide the 4 experts of a layer into two or more"),
        ({"routing": "smoes", "expert_bin_size": 4}, "expert_bin_size is 4"),
        ({"routing": "smoes", "expert_bin_size": 0}, "expert_bin_size is 0"),
        ({"router_mi_loss_coef": -1.0}, r"router_mi_loss_coef is -1\.0"),
    ],
)
def test_settings_that_break_a_rule(settings, message):
    with pytest.raises(ValueError, match=message):
        upcycle(tiny_dense("llama"), **settings)


# Experts split by modality


@pytest.mark.parametrize("capacity_factor", [None, 0.8])
@torch.no_grad()
def test_a_split_is_never_crossed(capacity_factor):
    sparse = shuffled_sparse("llama", routing="modality_split", num_experts=6, capacity_factor=capacity_factor)
    inputs = tiny_inputs(batch=3)
    is_image_T = (inputs["input_ids"] == 98).flatten()
    outputs = sparse(**inputs, output_router_logits=True)
    for layer in range(2):
        assert torch.equal(chosen(outputs, layer) < 3, is_image_T[:, None].expand(-1, 2))
        probs_TE = outputs.router_logits[layer].softmax(-1)
        assert (probs_TE[is_image_T, 3:] == 0).all()
        assert (probs_TE[~is_image_T, :3] == 0).all()
    assert outputs.aux_loss.isfinite()
    assert outputs.z_loss.isfinite()


def test_a_split_router_is_two_routers():
    x_TD, weight_ED = torch.randn(8, 3), torch.randn(6, 3)
    is_image_T = torch.tensor([True, False] * 4)
    split = Router(config(num_experts=6, routing="modality_split"), 3)
    halves = [Router(config(num_experts=3), 3) for _ in range(2)]
    with torch.no_grad():
        split.weight.copy_(weight_ED)
        halves[0].weight.copy_(weight_ED[:3])
        halves[1].weight.copy_(weight_ED[3:])
    _, weights_TK, ids_TK, _ = split(x_TD, None, is_image_T)
    for rows_T, half, first in ((is_image_T, halves[0], 0), (~is_image_T, halves[1], 3)):
        _, expected_TK, expected_ids_TK, _ = half(x_TD[rows_T])
        torch.testing.assert_close(weights_TK[rows_T], expected_TK)
        assert torch.equal(ids_TK[rows_T], expected_ids_TK + first)
    with pytest.raises(RuntimeError, match="the router got no image_mask"):
        split(x_TD)


@torch.no_grad()
def test_generated_tokens_are_text():
    sparse = shuffled_sparse("llama", routing="modality_split")
    inputs = tiny_inputs(batch=1)
    cache = DynamicCache(config=sparse.config.text_config)
    sparse(**inputs, past_key_values=cache)
    following = torch.tensor([[7]])
    outputs = sparse(input_ids=following, past_key_values=cache, output_router_logits=True)
    assert (chosen(outputs) >= 2).all()
    whole = {
        "input_ids": torch.cat([inputs["input_ids"], following], dim=1),
        "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 1),
        "pixel_values": inputs["pixel_values"],
    }
    torch.testing.assert_close(outputs.logits[:, -1], sparse(**whole).logits[:, -1], atol=1e-5, rtol=1e-5)


@by_modality
@torch.no_grad()
def test_padding_on_either_side_and_packing(routing):
    """Row by row, padded left and right, and packed into one row: the same losses, and the same lesson for the statistics."""
    sparse = learned() if routing == "smoes" else shuffled_sparse("llama", routing=routing)
    rows = [tiny_inputs(batch=1, text=text, seed=text) for text in (5, 9)]
    longest = max(row["input_ids"].shape[1] for row in rows)

    def padded(side):
        def pad(ids):
            missing = longest - ids.shape[1]
            return F.pad(ids, (missing, 0) if side == "left" else (0, missing))

        mask = torch.cat([pad(row["attention_mask"]) for row in rows])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return {"input_ids": torch.cat([pad(row["input_ids"]) for row in rows]), "attention_mask": mask, "position_ids": positions}

    packed = {
        "input_ids": torch.cat([row["input_ids"] for row in rows], dim=1),
        "position_ids": torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None],
        "use_cache": False,
    }
    pixels = torch.cat([row["pixel_values"] for row in rows])
    found, before = [], {name: buffer.clone() for name, buffer in sparse.state_dict().items()}
    for inputs in (padded("left"), padded("right"), packed):
        untaught = (inputs["input_ids"] >= 98) | (inputs["input_ids"] == 0) | (inputs["position_ids"] == 0)
        labels = inputs["input_ids"].masked_fill(untaught, -100)
        sparse.load_state_dict(before)
        outputs = sparse.train()(**inputs, pixel_values=pixels, labels=labels, output_router_logits=True)
        found.append((outputs.loss, statistics_of(sparse)))
    for loss, statistics in found[1:]:
        torch.testing.assert_close(loss, found[0][0], atol=1e-5, rtol=1e-5)
        for name, buffer in statistics.items():
            torch.testing.assert_close(buffer, found[0][1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_balance_within_groups_worked_by_hand():
    # Four tokens, experts {0, 2} and {1, 3}; first choices 0, 0, 2, 1.
    probs_TE = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.4, 0.2, 0.2, 0.2], [0.2, 0.1, 0.6, 0.1], [0.1, 0.6, 0.1, 0.2]])
    groups_GN = torch.tensor([[0, 2], [1, 3]])
    # Sums of probabilities: 1.4, 1.0, 1.0, 0.6.
    first = 2 * (2 / 3 * 1.4 / 2.4 + 1 / 3 * 1.0 / 2.4)
    second = 2 * (1.0 * 1.0 / 1.6 + 0.0)
    logits_TE = probs_TE.log()
    assert balance_loss((logits_TE,), groups=[groups_GN]).item() == pytest.approx((first + second) / 2)
    assert balance_loss((logits_TE,) * 2, groups=[groups_GN] * 2).item() == pytest.approx(first + second)
    assert balance_loss((logits_TE,), groups=[torch.arange(4)[None]]).item() == pytest.approx(balance_loss((logits_TE,)).item())
    # What goes to each group does not matter, only how it is shared out there.
    assert balance_loss((torch.zeros(8, 4)[:, :2].repeat(1, 2),), groups=[torch.tensor([[0], [1], [2], [3]])]).item() == pytest.approx(0.25)


def test_the_modalities_may_have_any_share_of_the_tokens():
    """Even halves cost 1 per layer, whether there is much text or little."""
    for number in (1, 30):
        logits_TE = torch.full((2 * number + 2, 4), torch.finfo(torch.float32).min)
        logits_TE[: 2 * number, :2] = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(number, 1)
        logits_TE[2 * number :, 2:] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        assert balance_loss((logits_TE,), groups=[torch.arange(4).view(2, 2)]).item() == pytest.approx(1.0)


def test_agnostic_models_hold_and_save_what_they_always_did():
    sparse = upcycle(tiny_dense("llama"))
    assert not statistics_of(sparse)
    inputs = tiny_inputs()
    outputs = sparse.train()(**inputs, labels=labels_of(inputs), output_router_logits=True)
    assert outputs.mi_loss is None
    assert outputs.modality_scores is None
    assert sparse.sparse_mlps()[0].image_mask is None
