"""What `generate` may do with images and placeholders: encode an image once, cut a prefill into chunks, write a placeholder."""

import json

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlavaForConditionalGeneration, PixtralVisionConfig

from moe_llava import MoeLlavaForConditionalGeneration, upcycle
from tests.conftest import IMAGE_TOKENS, tiny_config, tiny_dense, tiny_inputs
from tests.model.test_equivalences import shuffled_sparse

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def writes_placeholders(image_token_id: int = 98, **settings) -> MoeLlavaForConditionalGeneration:
    """A model whose likeliest token is always the placeholder, and then token 7."""
    sparse = shuffled_sparse("llama", **settings)
    sparse.lm_head = nn.Linear(32, 99)
    with torch.no_grad():
        sparse.lm_head.weight.zero_()
        sparse.lm_head.bias.zero_()
        sparse.lm_head.bias[7], sparse.lm_head.bias[98] = 1, 2
    return sparse


def towers_work(model) -> list[int]:
    """The number of images of each call of the tower, in a list that grows."""
    calls: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    return calls


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_a_placeholder_is_not_written(settings):
    assert (writes_placeholders().generate(**tiny_inputs(), **GREEDY, **settings)[:, -4:] == 7).all()


@pytest.mark.parametrize("routing", ["agnostic", "modality_split", "smoes"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_a_placeholder_that_is_written_all_the_same_is_a_token_like_others(settings, routing):
    sparse = writes_placeholders(routing=routing)
    written = sparse.generate(**tiny_inputs(), **GREEDY, **settings, suppress_tokens=[3])
    assert (written[:, -4:] == 98).all()


def test_a_placeholder_is_written_after_embeddings():
    written = writes_placeholders().generate(
        inputs_embeds=torch.randn(2, 6, 32), attention_mask=torch.ones(2, 6, dtype=torch.long), **GREEDY, suppress_tokens=[3]
    )
    assert (written[:, -4:] == 98).all()


@torch.no_grad()
def test_a_written_placeholder_has_its_own_embedding_and_no_image():
    """As in transformers' LLaVA, with a cache."""
    dense = tiny_dense("llama")
    dense.lm_head.weight.copy_(torch.randn_like(dense.lm_head.weight))
    sparse = upcycle(dense)
    inputs = tiny_inputs()
    expected, found = (
        model(input_ids=torch.full((2, 1), 98), past_key_values=model(**inputs, use_cache=True).past_key_values).logits
        for model in (dense, sparse)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_placeholder_is_suppressed_wherever_settings_come_from(tmp_path):
    dense = tiny_dense("llama")
    dense.generation_config.suppress_tokens = [5]
    sparse = upcycle(dense)
    assert sparse.generation_config.suppress_tokens == [5, 98]
    assert dense.generation_config.suppress_tokens == [5]
    sparse.save_pretrained(tmp_path)
    saved = tmp_path / "generation_config.json"
    assert json.loads(saved.read_text())["suppress_tokens"] == [5, 98]
    # A folder that was saved without it, and one without the file.
    saved.write_text(json.dumps({"max_new_tokens": 3}))
    loaded = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.suppress_tokens == [98]
    assert loaded.generation_config.max_new_tokens == 3
    saved.unlink()
    assert MoeLlavaForConditionalGeneration.from_pretrained(tmp_path).generation_config.suppress_tokens == [98]
    loaded.generation_config = GenerationConfig(suppress_tokens=[4])
    assert loaded.generation_config.suppress_tokens == [4, 98]


@pytest.mark.parametrize("image_token_id", [120, -200])
def test_a_placeholder_outside_the_vocabulary_is_no_obstacle(image_token_id):
    sparse = shuffled_sparse("llama")
    expected = sparse.generate(**tiny_inputs(), **GREEDY)[:, -4:]
    sparse.config.image_token_id = image_token_id
    sparse.generation_config = sparse.generation_config
    assert image_token_id in sparse.generation_config.suppress_tokens
    for settings in ({}, {"num_beams": 1, "use_cache": False}):
        assert torch.equal(sparse.generate(**tiny_inputs(image_token_id=image_token_id), **GREEDY, **settings)[:, -4:], expected)


def test_an_image_is_encoded_once_for_all_beams():
    sparse = shuffled_sparse("llama")
    calls = towers_work(sparse)
    once = sparse.generate(**tiny_inputs(), **GREEDY, num_beams=3)
    assert calls == [2]
    features = sparse.get_image_features(tiny_inputs()["pixel_values"], **feature_settings(sparse), return_dict=True)
    given = {**tiny_inputs(), "mm_encoder_outputs": {"image": features}}
    del given["pixel_values"]
    assert torch.equal(sparse.generate(**given, **GREEDY, num_beams=3), once)
    assert calls == [2, 2]


def feature_settings(model) -> dict:
    return {name: getattr(model.config, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}


@torch.no_grad()
def test_encoded_images_take_the_place_of_pixels():
    sparse = shuffled_sparse("llama")
    inputs = tiny_inputs()
    features = sparse.get_image_features(inputs["pixel_values"], **feature_settings(sparse), return_dict=True)
    expected = sparse(**inputs).logits
    encoded = {"input_ids": inputs["input_ids"], "mm_encoder_outputs": {"image": features}}
    assert torch.equal(sparse(**encoded).logits, expected)
    with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
        sparse(**encoded, pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("chunk", [1, 3, 4, 50])
@pytest.mark.parametrize("routing", ["agnostic", "modality_split"])
def test_a_prefill_in_chunks_is_the_whole(chunk, routing):
    sparse = shuffled_sparse("llama", routing=routing)
    expected = sparse.generate(**tiny_inputs(), **GREEDY)
    assert torch.equal(sparse.generate(**tiny_inputs(), **GREEDY, prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize("kinds", ["sparse sparse", "dense sparse", "sparse dense"])
def test_assisted_decoding_with_an_image_changes_nothing(kinds):
    target, assistant = kinds.split()
    model = shuffled_sparse("llama") if target == "sparse" else tiny_dense("llama")
    helper = shuffled_sparse("qwen2") if assistant == "sparse" else tiny_dense("qwen2")
    expected = model.generate(**tiny_inputs(batch=1), **GREEDY)
    assert torch.equal(model.generate(**tiny_inputs(batch=1), **GREEDY, assistant_model=helper), expected)


def test_candidates_from_the_prompt_may_be_placeholders():
    sparse = shuffled_sparse("llama")
    inputs = tiny_inputs(batch=1)
    inputs["input_ids"][:, -1] = inputs["input_ids"][:, 0]  # what came after it is the image
    expected = sparse.generate(**inputs, **GREEDY)
    assert torch.equal(sparse.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=IMAGE_TOKENS), expected)


def test_images_of_different_sizes():
    """Towers that take them need their sizes, which `generate` hands on if `forward` names them."""
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
    dense.generation_config.suppress_tokens = [98]
    assert torch.equal(upcycle(dense).generate(**inputs, **GREEDY), dense.generate(**inputs, **GREEDY))
