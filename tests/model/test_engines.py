"""What a serving engine with attention and kernels of its own, such as vLLM's backend for transformers, does with a saved model, done by
hand: it reads the fields of the text config, builds the model from the config, puts its own parts in, loads the weights by their names, and
gives it one row of embeddings with their positions."""

import inspect
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, LlavaForConditionalGeneration
from transformers.integrations import sonicmoe

from moe_llava import MoeLlavaForConditionalGeneration, upcycle
from tests.conftest import FAMILIES, tiny_config, tiny_dense, tiny_inputs

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
    replaces_experts = number_of_experts(folder) > 0
    with torch.device("meta"):
        model = AutoModel.from_config(config).eval()
        for layer in model.language_model.layers:
            experts = getattr(layer.mlp, "experts", None)
            # What an engine takes for experts that it knows: a child of this name with nothing but 3-D parameters, and fields for them.
            if experts is not None and replaces_experts:
                assert all(parameter.ndim == 3 for parameter in experts.parameters())
                layer.mlp.experts = EngineExperts(config.text_config)
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("lm_head.weight", weights["model.language_model.embed_tokens.weight"])
    assert head.shape[0] == config.text_config.vocab_size
    loaded = {name.removeprefix("model."): weight for name, weight in weights.items()}
    model.load_state_dict(loaded, assign=True, strict=False)
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]
    fresh = dict(AutoModel.from_config(config).named_buffers())  # those that no checkpoint holds, such as the frequencies of positions
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, fresh[f"{module_name}.{name}"])
    return model


@pytest.mark.parametrize(("family", "norm_topk_prob"), [("llama", True), ("qwen3", False), ("phi", True), ("gemma", True)])
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
    assert [module.calls for module in engines] == ([] if family in ("phi", "gemma") else [1, 1])


def number_of_experts(folder) -> int:
    """How vLLM decides whether to replace experts: before it builds the model."""
    return getattr(AutoConfig.from_pretrained(folder).get_text_config(), "num_experts", 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_for_engines_are_there_where_their_kernel_is_right(family, tmp_path):
    sparse = upcycle(tiny_dense(family), num_experts=3, num_experts_per_tok=1)
    sparse.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModel"] == "modeling.MoeLlavaModel"
    found = {name: saved["text_config"][name] for name in FIELDS if name in saved["text_config"]}
    gated_by_silu = family not in ("phi", "gemma", "gemma2", "gemma3")
    assert found == (dict(zip(FIELDS, (3, 1, True, 48), strict=True)) if gated_by_silu else {})
    assert number_of_experts(tmp_path) == (3 if gated_by_silu else 0)
    # What is loaded and saved again says the same.
    MoeLlavaForConditionalGeneration.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == saved


@pytest.mark.parametrize(("activation", "fused"), [("silu", True), ("gelu_pytorch_tanh", False), ("gelu", False), ("relu", False)])
@pytest.mark.parametrize(("family", "field"), [("llama", "hidden_act"), ("gemma", "hidden_act"), ("gemma2", "hidden_activation")])
def test_the_activation_is_that_of_the_module(family, field, activation, fused, tmp_path):
    config = tiny_config(family)
    setattr(config.text_config, field, activation)
    sparse = upcycle(LlavaForConditionalGeneration(config))
    sparse.save_pretrained(tmp_path)
    assert number_of_experts(tmp_path) == (4 if fused else 0)


def test_what_engines_ask_of_the_classes():
    sparse = upcycle(tiny_dense("llama"))
    assert type(sparse.model)._supports_attention_backend
    assert type(sparse.model).is_backend_compatible()
    assert sparse.model.get_decoder() is sparse.model.language_model


@pytest.mark.parametrize("family", ["llama", "phi", "gemma3"])
def test_the_constructor_of_the_decoder_may_be_wrapped_as_vllm_wraps_it(family, tmp_path, monkeypatch):
    """It looks for the decoder's class in a model on the meta device, and compares positional arguments with the annotations of its
    constructor, the first argument with that of `self`."""
    sparse = upcycle(tiny_dense(family))
    sparse.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        decoder = type(AutoModel.from_config(config).get_decoder())
    constructor = decoder.__init__
    calls = []

    def checked(self, *args, prefix="", **kwargs):
        annotations = [parameter.annotation for parameter in inspect.signature(constructor).parameters.values()]
        for argument, annotation in zip(args, annotations, strict=False):
            assert annotation is inspect.Parameter.empty or isinstance(argument, annotation)
        calls.append(type(self))
        constructor(self, *args, **kwargs)

    monkeypatch.setattr(decoder, "__init__", checked)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert calls == [decoder]
    inputs = tiny_inputs()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], sparse.model(**inputs)[0], atol=1e-5, rtol=1e-5)


class Kernel(SimpleNamespace):
    """Stands in for the kernel of sonicmoe, which needs a GPU: it records what it is to compute."""

    activation_type_enum = SimpleNamespace(SWIGLU="silu", GEGLU="gelu", REGLU="relu")

    def moe_general_routing_inputs(self, x_TD, *others, activation_type, **settings):
        self.computed.add(activation_type)
        return x_TD, None


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize(("family", "field"), [("llama", "hidden_act"), ("gemma2", "hidden_activation")])
def test_sonicmoe_computes_the_activation_of_the_model(family, field, activation, monkeypatch):
    kernel = Kernel(computed=set())
    monkeypatch.setattr(sonicmoe, "load_sonicmoe_kernel", lambda: kernel)
    config = tiny_config(family)
    setattr(config.text_config, field, activation)
    sparse = upcycle(LlavaForConditionalGeneration(config)).eval()
    sparse.set_experts_implementation("sonicmoe")
    with torch.no_grad():
        sparse(**tiny_inputs())
    assert kernel.computed == {activation}


@pytest.mark.parametrize(
    ("family", "what"), [("gemma", "GELUTanh"), ("gemma2", "GELUTanh"), ("phi", "PlainExperts with NewGELUActivation")]
)
def test_sonicmoe_refuses_what_it_would_compute_otherwise(family, what, tmp_path):
    sparse = upcycle(tiny_dense(family))
    with pytest.raises(ValueError, match=f"'sonicmoe' computes gated experts with silu, gelu, relu, .* {what}"):
        sparse.set_experts_implementation("sonicmoe")
    assert sparse.config._experts_implementation == "auto"
    sparse.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'sonicmoe' computes gated experts"):
        MoeLlavaForConditionalGeneration.from_pretrained(tmp_path, experts_implementation="sonicmoe")
    with pytest.raises(ValueError, match="'sonicmoe' computes gated experts"):
        AutoModel.from_pretrained(tmp_path, experts_implementation="sonicmoe")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 1.5}, r"capacity_factor is 1\.5, but the tokens of a batch share the capacity"),
        ({"moe_in": ["projector"]}, r"moe_in is \['projector'\], but vLLM serves experts in the language model alone"),
        ({"routing": "modality_split"}, "routing is modality_split, which vLLM supports by a plugin"),
    ],
)
def test_options_that_an_engine_cannot_honour_are_refused_when_it_starts(options, message):
    AttentionInterface.register("vllm", engine_attention)
    config = upcycle(tiny_dense("llama"), **options).config
    config.text_config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        AutoModel.from_config(config)
    config.engine_passes_image_mask, config.capacity_factor, config.moe_in = True, None, ["language_model"]
    with torch.device("meta"):
        AutoModel.from_config(config)
