import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from moe_llava import MoeLlavaConfig, MoeLlavaForConditionalGeneration, upcycle
from moe_llava.model.upcycling import NOISE_STD, evolve_experts
from tests.conftest import FAMILIES, tiny_config, tiny_dense, tiny_inputs
from tests.model.test_equivalences import labels_of


def test_frozen_weights_are_shared_not_copied():
    dense = tiny_dense("qwen2")
    sparse = upcycle(dense)
    own = {parameter.data_ptr() for parameter in dense.parameters()}
    for name, parameter in sparse.named_parameters():
        assert (parameter.data_ptr() in own) == (".experts." not in name and ".router." not in name), name


def test_router_start_is_small_and_seeded():
    weights = [upcycle(tiny_dense("llama"), seed=seed).sparse_mlps()[0].router.weight for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert 0.01 < weights[0].std() < 0.03


def test_experts_are_copies_of_their_own():
    dense = tiny_dense("phi")
    experts = upcycle(dense, num_experts=3).sparse_mlps()[2].experts
    ffn = dense.model.language_model.layers[2].mlp
    for expert in range(3):
        assert torch.equal(experts.up_proj[expert], ffn.fc1.weight)
        assert torch.equal(experts.up_proj_bias[expert], ffn.fc1.bias)
        assert torch.equal(experts.down_proj[expert], ffn.fc2.weight)
        assert torch.equal(experts.down_proj_bias[expert], ffn.fc2.bias)
    with torch.no_grad():
        experts.up_proj[0].zero_()
    assert ffn.fc1.weight.abs().sum() > 0
    assert experts.up_proj[1].abs().sum() > 0


@pytest.mark.parametrize(
    ("placement", "layers"),
    [("interval", [0, 2, 4]), ("all", [0, 1, 2, 3, 4]), ("first_half", [0, 1]), ("second_half", [2, 3, 4]), ([3, 1], [1, 3])],
)
def test_placement(placement, layers):
    assert list(upcycle(tiny_dense("llama", layers=5), moe_layers=placement).sparse_mlps()) == layers


def test_mode_dtype_and_generation_settings_are_kept():
    dense = tiny_dense("llama").to(torch.bfloat16).train()
    dense.generation_config.max_new_tokens = 17
    sparse = upcycle(dense)
    assert sparse.training
    assert {parameter.dtype for parameter in sparse.parameters()} == {torch.bfloat16}
    assert sparse.generation_config.max_new_tokens == 17


def test_attention_implementation_is_kept():
    dense = LlavaForConditionalGeneration._from_config(tiny_config("llama"), attn_implementation="eager")
    dense.model.vision_tower.set_attn_implementation("sdpa")
    sparse = upcycle(dense)
    assert sparse.model.language_model.config._attn_implementation == "eager"
    assert sparse.model.vision_tower.config._attn_implementation == "sdpa"


def test_experts_have_the_dtype_of_their_ffn():
    dense = tiny_dense("llama")
    dense.model.language_model.to(torch.bfloat16)
    sparse = upcycle(dense)
    assert {parameter.dtype for parameter in sparse.sparse_mlps()[0].parameters()} == {torch.bfloat16}


def test_tied_embeddings_stay_tied():
    config = tiny_config("llama")
    config.text_config.tie_word_embeddings = True
    config.tie_word_embeddings = True
    sparse = upcycle(LlavaForConditionalGeneration(config))
    assert sparse.lm_head.weight is sparse.get_input_embeddings().weight


@pytest.mark.parametrize("tied_text", [True, False])
def test_a_head_is_tied_where_the_dense_one_is(tied_text, tmp_path):
    """The text config may say otherwise: LlavaConfig takes that over when it is built, not later."""
    dense = tiny_dense("llama")
    dense.config.text_config.tie_word_embeddings = tied_text
    inputs = tiny_inputs()
    with torch.no_grad():
        expected = dense(**inputs).logits
        sparse = upcycle(dense)
        torch.testing.assert_close(sparse(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
        sparse.save_pretrained(tmp_path)
        loaded = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert dense.config.text_config.tie_word_embeddings is tied_text


# Relative to the norm of the logits. In half precision the weights of a token's experts are rounded, and with them their sum of 1.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@torch.no_grad()
def test_upcycled_computes_what_dense_computed_to_the_rounding_of_the_dtype(family, dtype):
    dense = tiny_dense(family).to(dtype)
    inputs = tiny_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    expected = dense(**inputs).logits.float()
    for top_k in (1, 2):
        difference = upcycle(dense, moe_layers="all", num_experts_per_tok=top_k)(**inputs).logits.float() - expected
        assert difference.norm() <= TOLERANCES[dtype] * expected.norm()


def test_only_dense_vision_language_models_are_taken():
    sparse = upcycle(tiny_dense("llama"))
    with pytest.raises(ValueError, match="MoeLlavaForConditionalGeneration is sparse already, its experts were made by upcycle"):
        upcycle(sparse)
    with pytest.raises(ValueError, match="takes a vision-language model, but the configuration of LlamaForCausalLM has no vision_config"):
        upcycle(LlamaForCausalLM(tiny_config("llama").text_config))
    with pytest.raises(ValueError, match="takes a vision-language model with transformers' generate, which LlavaModel lacks"):
        upcycle(tiny_dense("llama").model)
    with pytest.raises(TypeError, match="takes a vision-language model of transformers, not a Linear"):
        upcycle(nn.Linear(2, 2))


def test_unknown_family_names_modules_and_where_to_add_a_row():
    dense = tiny_dense("llama")
    dense.model.language_model.layers[0].mlp = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    with pytest.raises(ValueError, match=r"ffn\.py describes Sequential, whose parameters are: 0\.bias, 0\.weight, 1\.bias, 1\.weight"):
        upcycle(dense)
    del dense.model.language_model.layers[0].mlp
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer has no module 'mlp'.*self_attn"):
        upcycle(dense)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3, but must lie in 1..num_experts=2"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"moe_layers": [0, 4]}, r"names layer 4, but the language model has layers 0\.\.3"),
        ({"moe_layers": [-1]}, "names layer -1"),
        ({"moe_layers": []}, "at least one layer"),
        ({"moe_layers": [1, 1]}, "none twice"),
        ({"moe_layers": "intervall"}, "must be one of interval, all"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef is -1.0"),
        ({"router_z_loss_coef": -1.0}, "router_z_loss_coef is -1.0"),
    ],
)
def test_settings_that_break_a_rule(settings, message):
    with pytest.raises(ValueError, match=message):
        upcycle(tiny_dense("llama"), **settings)


def test_config_round_trip(tmp_path):
    config = upcycle(tiny_dense("gemma"), num_experts=3, moe_layers=[1, 2], capacity_factor=1.5, use_residual=True).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MoeLlavaConfig
    assert isinstance(loaded, LlavaConfig)
    assert (loaded.num_experts, loaded.moe_layers, loaded.capacity_factor, loaded.use_residual) == (3, [1, 2], 1.5, True)
    assert loaded.moe_layer_indices == [1, 2]


def test_random_start_without_a_checkpoint():
    dense = tiny_config("phi").to_dict()
    dense.pop("model_type")
    model = MoeLlavaForConditionalGeneration(MoeLlavaConfig(**dense))
    experts = model.sparse_mlps()[0].experts
    assert 0.15 < experts.up_proj.std() < 0.25  # initializer_range of the tiny configuration
    assert experts.up_proj_bias.abs().sum() == 0
    assert not torch.equal(experts.up_proj[0], experts.up_proj[1])


def test_noise_makes_experts_differ_and_is_seeded():
    dense = tiny_dense("phi")
    copies, noisy, same, other = (
        upcycle(dense, expert_start=start, seed=seed).sparse_mlps()
        for start, seed in (("copy", 3), ("noise", 3), ("noise", 3), ("noise", 4))
    )
    for layer in (0, 2):
        assert torch.equal(noisy[layer].router.weight, copies[layer].router.weight)
        for name, parameter in noisy[layer].experts.named_parameters():
            copied = copies[layer].experts.get_parameter(name)
            difference = parameter - copied
            assert torch.equal(parameter, same[layer].experts.get_parameter(name))
            if copied.std() == 0:  # biases of a random model
                assert torch.equal(parameter, copied)
                continue
            assert not torch.equal(parameter, other[layer].experts.get_parameter(name))
            assert not torch.equal(difference[0], difference[1])
            assert (difference.std() / copied.std()).item() == pytest.approx(NOISE_STD, rel=0.05)
    with pytest.raises(ValueError, match="expert_start is 'copies', but must be one of copy, noise"):
        upcycle(dense, expert_start="copies")


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_evolved_experts_are_those_of_the_formula(family):
    """theta_n = beta_n theta_1 + (1 - beta_n) grad theta_1, with the gradient of the dense model."""
    dense = tiny_dense(family)
    batches = [{**inputs, "labels": labels_of(inputs)} for inputs in (tiny_inputs(seed=1), tiny_inputs(seed=2))]
    down = dense.model.language_model.layers[2].mlp
    weight = (down.fc2 if family == "phi" else down.down_proj).weight
    gradient = sum(torch.autograd.grad(dense(**batch).loss, weight)[0] for batch in batches) / 2
    found = []
    for seed in (0, 0, 1):
        sparse = upcycle(dense).train()
        evolve_experts(sparse, batches, seed=seed)
        assert sparse.training
        assert all(parameter.grad is None for parameter in sparse.parameters())
        found.append(sparse.sparse_mlps()[2].experts.down_proj.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[0][0], weight)
    for expert, (low, high) in zip(found[0][1:], ((0.9, 0.99), (0.8, 0.89), (0.7, 0.79)), strict=True):
        # The beta that fits best, and how well it fits.
        towards = weight - gradient
        beta = (((expert - gradient) * towards).sum() / towards.square().sum()).item()
        assert low <= beta <= high
        torch.testing.assert_close(expert, beta * weight + (1 - beta) * gradient, atol=1e-5, rtol=1e-4)


def test_what_cannot_evolve():
    inputs = tiny_inputs()
    batches = [{**inputs, "labels": labels_of(inputs)}]
    with pytest.raises(ValueError, match="num_experts is 5, but expert evolution has rates for 4 only"):
        evolve_experts(upcycle(tiny_dense("llama"), num_experts=5), batches)
    with pytest.raises(ValueError, match="at least one batch"):
        evolve_experts(upcycle(tiny_dense("llama")), [])
    with pytest.raises(ValueError, match="experts of layer 0 differ in gate_up_proj already"):
        evolve_experts(upcycle(tiny_dense("llama"), expert_start="noise"), batches)
