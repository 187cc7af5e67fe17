"""What a serving engine with attention and kernels of its own, such as vLLM's backend for transformers, does with a saved model, done by
hand: it reads the fields of the text config, builds the model from the config, puts its own parts in, loads the weights by their names, and
gives it one row of embeddings with their positions."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel

from moe_llava import upcycle
from tests.conftest import FAMILIES, tiny_dense, tiny_inputs

FIELDS = ("num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size")


class EngineExperts(nn.Module):
    """Experts gated by SiLU, sized by the text config alone. Routing comes from outside, as (states, expert indices, weights)."""

    def __init__(self, text_config):
        super().__init__()
        experts, width, ffn_width = text_config.num_experts, text_config.hidden_size, text_config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * ffn_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, ffn_width))
        self.calls = 0

    def forward(self, x_TD, ids_TK, weights_TK):
        self.calls += 1
        gate_TKF, up_TKF = torch.einsum("td,tkfd->tkf", x_TD, self.gate_up_proj[ids_TK]).chunk(2, dim=-1)
        return torch.einsum("tkf,tkdf,tk->td", F.silu(gate_TKF) * up_TKF, self.down_proj[ids_TK], weights_TK)


def engine_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """It keeps the cache and the mask to itself: none is given to it."""
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True)
    return out.transpose(1, 2).contiguous(), None


def engine_model(folder):
    """The model without its head, as an engine makes it, with its own parts."""
    config = AutoConfig.from_pretrained(folder)
    config.text_config._attn_implementation = "engine"
    with torch.device("meta"):
        model = AutoModel.from_config(config).eval()
        for layer in model.language_model.layers:
            experts = getattr(layer.mlp, "experts", None)
            # What an engine takes for experts that it knows: a child of this name with nothing but 3-D parameters, and fields for them.
            if experts is not None and hasattr(config.text_config, "num_experts"):
                assert all(parameter.ndim == 3 for parameter in experts.parameters())
                layer.mlp.experts = EngineExperts(config.text_config)
    weights = load_file(folder / "model.safetensors")
    assert weights.pop("lm_head.weight").shape[0] == config.text_config.vocab_size
    loaded = {name.removeprefix("model."): weight for name, weight in weights.items()}
    model.load_state_dict(loaded, assign=True, strict=False)
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]
    for module in model.modules():  # buffers that no checkpoint holds: the frequencies of positions, and the numbers of patches
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                made = hasattr(module, "inv_freq")
                setattr(module, name, getattr(type(module)(config.text_config), name) if made else torch.arange(buffer.shape[-1])[None])
    return model


@pytest.mark.parametrize(("family", "norm_topk_prob"), [("llama", True), ("qwen3", False), ("phi", True)])
def test_an_engine_computes_the_same(family, norm_topk_prob, tmp_path):
    AttentionInterface.register("engine", engine_attention)
    sparse = upcycle(tiny_dense(family), num_experts=3, norm_topk_prob=norm_topk_prob, expert_start="noise").eval()
    sparse.save_pretrained(tmp_path)
    inputs = tiny_inputs(batch=1)
    model = engine_model(tmp_path)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        images_TD = torch.cat(list(features)).flatten(0, -2)
        is_image = inputs["input_ids"] == sparse.config.image_token_id
        embeds = model.get_input_embeddings()(inputs["input_ids"].masked_fill(is_image, 0))
        embeds[is_image] = images_TD
        positions = torch.arange(embeds.shape[1])[None]
        found = model(input_ids=None, inputs_embeds=embeds, use_cache=False, position_ids=positions, return_dict=False)[0]
        expected = sparse.model(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    engines = [module for module in model.modules() if isinstance(module, EngineExperts)]
    assert [module.calls for module in engines] == ([] if family == "phi" else [1, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_for_engines_are_there_where_their_kernel_is_right(family, tmp_path):
    sparse = upcycle(tiny_dense(family), num_experts=3, num_experts_per_tok=1)
    sparse.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModel"] == "modeling.MoeLlavaModel"
    found = {name: saved["text_config"][name] for name in FIELDS if name in saved["text_config"]}
    act = sparse.config.text_config.hidden_act
    if act == "silu":
        assert found == dict(zip(FIELDS, (3, 1, True, 48), strict=True))
    else:
        assert found == {}
        assert act in ("gelu_new", "gelu_pytorch_tanh")


def test_what_engines_ask_of_the_classes():
    sparse = upcycle(tiny_dense("llama"))
    assert type(sparse.model)._supports_attention_backend
    assert type(sparse.model).is_backend_compatible()
    assert sparse.model.get_decoder() is sparse.model.language_model
