"""What must not change what a model computes, for every family."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, PixtralVisionConfig, StaticCache
from transformers.loss.loss_utils import ForCausalLMLoss

from moe_llava import MoeLlavaForConditionalGeneration, upcycle
from tests.conftest import FAMILIES, IMAGE_TOKENS, tiny_config, tiny_dense, tiny_inputs

every_family = pytest.mark.parametrize("family", FAMILIES)


def shuffled_sparse(family: str, **settings) -> MoeLlavaForConditionalGeneration:
    """A sparse model whose experts differ, as after training."""
    sparse = upcycle(tiny_dense(family), **settings)
    torch.manual_seed(5)
    with torch.no_grad():
        for mlp in sparse.sparse_mlps().values():
            for parameter in mlp.experts.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            mlp.router.weight.mul_(20)
    return sparse


def labels_of(inputs: dict) -> torch.Tensor:
    """Every text token but the first, which nothing comes before."""
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 98, -100)
    return labels.masked_fill(inputs["attention_mask"].cumsum(-1) * inputs["attention_mask"] <= 1, -100)


@every_family
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("use_residual", [False, True])
@torch.no_grad()
def test_upcycled_computes_what_dense_computed(family, top_k, use_residual):
    dense = tiny_dense(family)
    inputs = tiny_inputs()
    expected = dense(**inputs).logits
    sparse = upcycle(dense, num_experts_per_tok=top_k, use_residual=use_residual)
    assert (sparse(**inputs).logits - expected).abs().max() <= 1e-5
    assert len(sparse.sparse_mlps()) == 2


@every_family
@torch.no_grad()
def test_saved_is_loaded_bitwise(family, tmp_path):
    sparse = shuffled_sparse(family, use_residual=True)
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is MoeLlavaForConditionalGeneration
    assert loaded.config.to_dict() == sparse.config.to_dict() | {"_name_or_path": loaded.config._name_or_path}
    saved, got = sparse.state_dict(), loaded.state_dict()
    assert saved.keys() == got.keys()
    assert all(torch.equal(saved[name], got[name]) for name in saved)
    # Not bitwise: loaded weights are mapped from the file at other alignments, and kernels may then sum in another order.
    inputs = tiny_inputs()
    torch.testing.assert_close(loaded(**inputs).logits, sparse(**inputs).logits, atol=1e-5, rtol=0)


@every_family
@torch.no_grad()
def test_cached_generation_is_uncached(family):
    sparse = shuffled_sparse(family)
    inputs = tiny_inputs(batch=2)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = sparse.generate(**inputs, **settings, use_cache=True)
    assert cached.shape[1] == inputs["input_ids"].shape[1] + 6
    assert torch.equal(cached, sparse.generate(**inputs, **settings, use_cache=False))


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_is_unpadded(family, side):
    sparse = shuffled_sparse(family)
    alone = tiny_inputs(batch=1)
    pad = 5
    ids = torch.zeros(1, pad, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([ids, alone["input_ids"]] if side == "left" else [alone["input_ids"], ids], dim=1),
        "attention_mask": torch.cat([ids, alone["attention_mask"]] if side == "left" else [alone["attention_mask"], ids], dim=1),
        "pixel_values": alone["pixel_values"],
    }
    padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    where = slice(pad, None) if side == "left" else slice(None, -pad)
    expected = sparse(**alone, labels=labels_of(alone), output_router_logits=True)
    got = sparse(**padded, labels=labels_of(padded), output_router_logits=True)
    torch.testing.assert_close(got.logits[:, where], expected.logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss, atol=1e-5, rtol=1e-5)


@every_family
@torch.no_grad()
def test_batches_of_one_two_and_three_are_alike(family):
    sparse = shuffled_sparse(family)
    three = tiny_inputs(batch=3)
    together = sparse(**three).logits
    for size in (1, 2):
        rows = {name: value[:size] for name, value in three.items()}
        torch.testing.assert_close(sparse(**rows).logits, together[:size], atol=2e-5, rtol=1e-5)


@every_family
def test_gradient_checkpointing_changes_nothing(family):
    inputs = tiny_inputs()
    gradients = []
    for checkpointing in (False, True):
        sparse = shuffled_sparse(family).train()
        if checkpointing:
            sparse.gradient_checkpointing_enable()
        sparse(**inputs, labels=labels_of(inputs)).loss.backward()
        gradients.append({name: p.grad for name, p in sparse.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], msg=name)


def loss_of_all_logits(model, inputs: dict, labels: torch.Tensor, **settings) -> torch.Tensor:
    """The language loss as transformers has it, of the logits of all tokens, and what comes to it."""
    outputs = model(**inputs, output_router_logits=True)
    loss = ForCausalLMLoss(outputs.logits, labels, vocab_size=99, **settings)
    share = (labels[:, 1:] != -100).sum() / settings["num_items_in_batch"] if settings else 1.0
    return loss + share * model.config.router_aux_loss_coef * outputs.aux_loss


@every_family
@pytest.mark.parametrize("settings", [{}, {"num_items_in_batch": torch.tensor(50)}], ids=["mean", "sum"])
def test_training_makes_logits_only_where_a_label_is_predicted(family, settings):
    sparse = shuffled_sparse(family).train()
    inputs = tiny_inputs(batch=3)
    labels = labels_of(inputs)
    labels[0, -4:], labels[1] = -100, -100  # rows with fewer labels, and none
    widths = []
    sparse.lm_head.register_forward_hook(lambda _, arguments, output: widths.append(arguments[0].shape[:-1].numel()))
    found = []
    for lean in (False, True):
        sparse.zero_grad()
        loss = sparse(**inputs, labels=labels, **settings).loss if lean else loss_of_all_logits(sparse, inputs, labels, **settings)
        loss.backward()
        found.append((loss, {name: parameter.grad for name, parameter in sparse.named_parameters() if parameter.grad is not None}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert widths == [labels.numel(), int((labels[:, 1:] != -100).sum())]


def test_the_logits_of_training_are_those_of_the_tokens_that_predict_a_label():
    sparse = shuffled_sparse("llama")
    inputs = tiny_inputs()
    labels = labels_of(inputs)
    whole = sparse(**inputs, labels=labels)
    predicts = torch.cat([labels[:, 1:] != -100, torch.zeros(2, 1, dtype=torch.bool)], dim=1)
    sparse.train()
    torch.testing.assert_close(sparse(**inputs, labels=labels).logits, whole.logits[predicts])
    # Labels that are shifted already are taken as they are, and positions that are asked for too.
    shifted = labels.roll(-1, dims=1)
    shifted[:, -1] = -100
    torch.testing.assert_close(sparse(**inputs, labels=labels, shift_labels=shifted).language_loss, whole.loss)
    chosen = sparse(**inputs, labels=labels, logits_to_keep=torch.arange(4, 9), shift_labels=shifted[:, 4:9].contiguous())
    torch.testing.assert_close(chosen.logits, whole.logits[:, 4:9])


def test_a_batch_without_a_label_has_a_loss_of_zero_and_gradients():
    """In accumulation, and in several processes: none may be left without a gradient where its neighbours have one."""
    sparse = shuffled_sparse("llama").train()
    inputs = tiny_inputs()
    loss = sparse(**inputs, labels=torch.full_like(inputs["input_ids"], -100), num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    assert loss.item() == 0
    for name in ("lm_head.weight", "model.language_model.layers.0.mlp.router.weight", "model.multi_modal_projector.linear_1.weight"):
        assert sparse.get_parameter(name).grad.abs().sum() == 0, name


@every_family
def test_gradients_reach_routers_and_used_experts(family):
    sparse = shuffled_sparse(family).train()
    inputs = tiny_inputs(batch=3)
    outputs = sparse(**inputs, labels=labels_of(inputs), output_router_logits=True)
    outputs.language_loss.backward()
    for logits, mlp in zip(outputs.router_logits, sparse.sparse_mlps().values(), strict=True):
        assert mlp.router.weight.grad.abs().sum() > 0
        used = set(logits.topk(2).indices.flatten().tolist())
        for name, parameter in mlp.experts.named_parameters():
            reached = {expert for expert in range(4) if parameter.grad[expert].abs().sum() > 0}
            assert reached == used, name


@every_family
@torch.no_grad()
def test_expert_backends_agree(family):
    sparse = shuffled_sparse(family)
    inputs = tiny_inputs()
    logits = {}
    for backend in ("eager", "grouped_mm", "batched_mm"):
        sparse.set_experts_implementation(backend)
        assert sparse.config._experts_implementation == backend
        logits[backend] = sparse(**inputs).logits
    torch.testing.assert_close(logits["grouped_mm"], logits["eager"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits["batched_mm"], logits["eager"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_placeholder_needs_no_row_in_the_embedding_table():
    sparse = shuffled_sparse("llama")
    inside = tiny_inputs()
    expected = sparse(**inside).logits
    for outside_id in (120, -200):
        sparse.config.image_token_id = outside_id
        outside = tiny_inputs(image_token_id=outside_id)
        assert torch.equal(sparse(**outside).logits, expected)
    assert expected.shape[-1] == 99


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_static_cache_generates_the_same(family):
    sparse = shuffled_sparse(family)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = sparse.generate(**tiny_inputs(), **settings)
    assert torch.equal(sparse.generate(**tiny_inputs(), **settings, cache_implementation="static"), expected)


@torch.no_grad()
def test_a_step_of_decoding_is_one_graph():
    """torch.compile makes CUDA graphs of it, where there are, only as a whole."""
    torch.compiler.reset()  # what another test compiled with breaks would not be tried as a whole
    sparse = shuffled_sparse("llama")
    inputs = tiny_inputs()
    token, found = {"input_ids": torch.tensor([[5], [7]])}, []
    for step in (sparse, torch.compile(sparse, backend="eager", fullgraph=True)):
        cache = StaticCache(config=sparse.config.text_config, max_cache_len=64)
        cached = sparse(**inputs, past_key_values=cache).logits.shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        found.append(step(**token, attention_mask=mask, position_ids=torch.tensor([[cached], [cached]]), past_key_values=cache).logits)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_images_of_different_sizes():
    """A tower that takes them (Pixtral), as in transformers' own LLaVA."""
    config = tiny_config("llama")
    config.vision_config = PixtralVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config.vision_feature_layer, config.vision_feature_select_strategy = -1, "full"
    torch.manual_seed(0)
    dense = LlavaForConditionalGeneration(config).eval()
    inputs = {
        "input_ids": torch.tensor([[5] + [98] * 4 + [6] + [98] * 2 + [7]]),
        "pixel_values": torch.randn(2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16], [16, 8]]),
    }
    torch.testing.assert_close(upcycle(dense)(**inputs).logits, dense(**inputs).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_text_without_image():
    sparse = shuffled_sparse("llama")
    ids = torch.randint(3, 97, (2, 7))
    assert sparse(input_ids=ids).logits.shape == (2, 7, 99)


def test_images_and_placeholders_must_match():
    sparse = upcycle(tiny_dense("llama"))
    inputs = tiny_inputs(batch=2)
    with pytest.raises(ValueError, match=f"do not match, tokens: {2 * IMAGE_TOKENS}"):
        sparse(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"][:1])
    with pytest.raises(ValueError, match=f"found {2 * IMAGE_TOKENS} image placeholders in input_ids, but no images"):
        sparse(input_ids=inputs["input_ids"])


def test_either_ids_or_embeddings():
    sparse = upcycle(tiny_dense("llama"))
    ids = torch.ones(1, 3, dtype=torch.long)
    embeds = torch.zeros(1, 3, 32)
    assert torch.is_tensor(sparse(inputs_embeds=embeds).logits)
    with pytest.raises(ValueError, match="exactly one"):
        sparse()
    with pytest.raises(ValueError, match="exactly one"):
        sparse(input_ids=ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="do not match, tokens: 0"):
        sparse(inputs_embeds=embeds, pixel_values=torch.zeros(1, 3, 16, 16))


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="use_reentrant"):
        upcycle(tiny_dense("llama")).gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("k", [1, 3])
def test_experts_per_token_may_change_at_load(tmp_path, k):
    upcycle(tiny_dense("llama"), num_experts=4).save_pretrained(tmp_path)
    changed = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, num_experts_per_tok=k)
    assert changed.config.num_experts_per_tok == k
    router = changed.sparse_mlps()[0].router
    assert router(torch.randn(5, 32))[2].shape == (5, k)


def test_more_experts_per_token_than_there_are_is_refused_at_load(tmp_path):
    upcycle(tiny_dense("llama"), num_experts=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"num_experts_per_tok is 5, but must lie in 1\.\.num_experts=4"):
        MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, num_experts_per_tok=5)
