"""Counts from configurations alone, and the paper's table of models."""

import json

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, MistralConfig, PhiConfig, Qwen2Config, StableLmConfig

from moe_llava import upcycle
from moe_llava.model.options import MoeOptions
from moe_llava.model.upcycling import sparse_config
from moe_llava.training.adapters import attach
from moe_llava.training.budget import active_parameters, count, stage_cost, survey
from moe_llava.training.memory import Batch
from moe_llava.training.recipe import Adapter, load_recipe
from moe_llava.training.stage import on_meta
from tests.checkpoints import tiny_published
from tests.conftest import REPOSITORY, refused, run_here, tiny_dense, wide_dense
from tests.training.conftest import tiny_base, write_recipe  # noqa: F401

# The language models of the paper, from their published configurations.
LANGUAGE_MODELS = {
    "stablelm": StableLmConfig(
        vocab_size=100352, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32,
        use_qkv_bias=True,
    ),
    "qwen": Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16
    ),
    "phi": PhiConfig(vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32),
    "openchat": MistralConfig(
        vocab_size=32002, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    ),
}  # fmt: skip
TOWER = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
)


def sparse_on_meta(name, moe_layers="interval"):
    dense = LlavaConfig(text_config=LANGUAGE_MODELS[name], vision_config=TOWER)
    return on_meta(sparse_config(dense, MoeOptions(num_experts=4, num_experts_per_tok=2, moe_layers=moe_layers)))


@pytest.mark.parametrize(
    ("name", "moe_layers", "active", "total"),
    [
        # Table 1 of the paper (arXiv 2401.15947), in 1e9. Left out: what follows from a base that the paper counts wrongly, the active
        # parameters of 1.6Bx4 (2.0) and of 7Bx4 (9.6; total 15.2): its bases are 1.6 and 6.7, the configurations' 1.64 and 7.24.
        ("stablelm", "interval", None, 2.9),
        ("stablelm", "all", 2.5, 4.1),
        ("qwen", "interval", 2.2, 3.1),
        ("qwen", "all", 2.6, 4.3),
        ("phi", "interval", 3.6, 5.3),
        ("phi", "all", 4.5, 7.8),
    ],
)
def test_the_papers_table(name, moe_layers, active, total):
    found_total, found_active = count(sparse_on_meta(name, moe_layers)).language_model
    assert found_total / 1e9 == pytest.approx(total, rel=0.02)
    if active is not None:
        assert found_active / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize(
    ("name", "active", "total"), [("stablelm", 2.06, 2.89), ("qwen", 2.24, 3.05), ("phi", 3.62, 5.30), ("openchat", 10.06, 15.70)]
)
def test_counted_from_the_configurations(name, active, total):
    found_total, found_active = count(sparse_on_meta(name)).language_model
    assert (round(found_active / 1e9, 2), round(found_total / 1e9, 2)) == (active, total)


def test_a_recipe_whose_model_is_not_made_yet_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for verb in ("params", "train"):
        assert "runs/digits/base does not exist: `moe-llava digits` makes it" in refused(verb, REPOSITORY / "recipes" / "digits.yaml")


def test_every_parameter_is_in_one_part():
    for family in ("phi", "qwen3", "gemma"):
        dense = tiny_dense(family)
        sparse = upcycle(dense, num_experts=4, num_experts_per_tok=1, use_residual=True)
        for model in (dense, sparse):
            assert sum(count(model).total.values()) == sum(parameter.numel() for parameter in model.parameters())
        ffn = sum(parameter.numel() for parameter in dense.model.language_model.layers[0].mlp.parameters())
        assert count(dense).total["FFN"] == count(sparse).total["FFN"] == 4 * ffn
        assert count(sparse).total["experts"] == 2 * 4 * ffn
        assert count(sparse).active["experts"] == 2 * ffn
        assert count(sparse).total["router"] == 2 * (4 * 32 + 2 * 32 + 2)


def test_active_parameters_leave_out_idle_experts():
    dense = tiny_dense("llama")
    total = sum(parameter.numel() for parameter in dense.parameters())
    assert active_parameters(dense) == total
    sparse = upcycle(dense, num_experts=4, num_experts_per_tok=1)
    # One expert per token is as much as the dense model, and a router of 4 x 32 in each of two layers.
    assert active_parameters(sparse) == total + 2 * 4 * 32


def test_flops_and_cache_by_hand():
    """Llama with 4 layers, width 32, FFN 48, 4 heads of width 8, 2 of them for keys and values, vocabulary 99; 2,048 tokens of context."""
    budget = count(tiny_dense("llama"))
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    assert budget.flops == 2 * (4 * layer + 32 * 99) + 4 * (2 * 2 * 32 * 2048)
    assert budget.cache_bytes == 4 * 2 * 16 * 2


def test_training_memory():
    """float32: 4 bytes of weight for all, and 12 of gradient and moments for what learns."""
    dense = tiny_dense("llama")
    total = sum(parameter.numel() for parameter in dense.parameters())
    projector = sum(parameter.numel() for parameter in dense.model.multi_modal_projector.parameters())
    assert stage_cost(dense, "stage1", []).memory == 4 * total + 12 * projector
    sparse = upcycle(dense)
    parts = count(sparse).total
    expected = 4 * sum(parts.values()) + 12 * (parts["experts"] + parts["router"])
    assert stage_cost(sparse, "stage3", sparse.config.moe_layer_indices).memory == expected


def test_training_arithmetic_by_hand():
    """A product of weights costs as much backward for its input as forward, and as much again if the weights learn. Below the first layer
    that learns there is no gradient: in stage III, in layer 0, not of its attention, nor of the input of its FFN."""
    dense = tiny_dense("llama")
    layer, head, scores = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48, 32 * 99, 2 * 2 * 32 * 2048
    products = 2 * (4 * layer + head)
    assert stage_cost(dense, "stage1", []).flops == 2 * products + 4 * 3 * scores
    assert stage_cost(dense, "stage2", []).flops == 3 * products + 4 * 3 * scores
    assert stage_cost(dense, "stage2", [], checkpointing=True).flops == 4 * products - 2 * head + 4 * 4 * scores
    unreached = 2 * (layer - 32 * 48) + 2 * scores  # all of layer 0 but the gradient of down_proj's input
    assert stage_cost(dense, "dense", [0, 2]).flops == 2 * products + 4 * 3 * scores + 2 * 2 * 3 * 32 * 48 - unreached
    below = 2 * 2 * layer + 2 * 2 * scores  # layers 0 and 1
    within = unreached + below
    assert stage_cost(dense, "dense", [2, 3]).flops == 2 * products + 4 * 3 * scores + 2 * 2 * 3 * 32 * 48 - within
    sparse = upcycle(dense)
    more = 2 * 2 * (3 * 32 * 48 + 4 * 32)  # in two layers a second expert for each token, and a router
    learning = 2 * 2 * (2 * 3 * 32 * 48 + 4 * 32)
    unreached += 2 * (2 * 32 * 48 + 4 * 32)  # gate_proj and up_proj of the second expert, and the router
    assert stage_cost(sparse, "stage3", [0, 2]).flops == 2 * (products + more) + 4 * 3 * scores + learning - unreached


@pytest.mark.parametrize(("kind", "linear_bytes"), [(None, 4), ("int8", 1), ("nf4", 0.5)])
def test_the_memory_that_an_adapter_takes(kind, linear_bytes):
    """Gradients and moments of what it adds and of the projector, no others; and what is quantised is smaller, but for its scales."""
    dense = tiny_dense("llama")
    parts = count(dense).total
    linear = parts["attention"] + parts["FFN"]
    model, counts = attach(tiny_dense("llama"), Adapter(["attention"], rank=2), "stage2", "")
    added = sum(value.numel() for name, value in model.named_parameters() if ".lora_" in name)
    assert counts.trained == {"projector": parts["projector"], "attention adapter": added}
    got = stage_cost(dense, "stage2", [], Adapter(["attention"], rank=2, quantisation=kind)).memory
    expected = 4 * (sum(parts.values()) - linear) + linear_bytes * linear + 16 * added + 12 * parts["projector"]
    scales = {None: 0, "int8": 4 / 32, "nf4": 4 / 64}[kind] * linear
    assert expected <= got <= expected + 1.05 * scales


@pytest.mark.parametrize(("experts", "halved"), [(False, True), (True, False)], ids=["stacked", "quantised"])
def test_of_a_quantised_base_only_stacks_are_in_bfloat16(experts, halved):
    sparse, adapter = upcycle(wide_dense("llama")), Adapter(["attention"], rank=2, quantisation="nf4", quantise_experts=experts)
    half, whole = (stage_cost(sparse, "stage3", [0, 2], adapter, bf16=bf16).memory for bf16 in (True, False))
    assert whole - half == 2 * count(sparse).total["experts"] * halved


@pytest.mark.parametrize("adapter", [None, Adapter(["attention"], rank=2)], ids=["all", "adapter"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_precision_of_a_checkpoint_does_not_count(adapter, bf16):
    """Training holds float32, however the weights are stored."""
    costs = [
        stage_cost(tiny_dense("llama").to(dtype), "stage2", [], adapter, batch=Batch(1, 8, 1), bf16=bf16)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert costs[0] == costs[1]


def test_the_memory_that_an_adapter_takes_in_bfloat16():
    """Frozen matrices take 2 bytes, and autocast keeps no copy of them."""
    dense, adapter = tiny_dense("llama"), Adapter(["attention"], rank=2)
    parts = count(dense).total
    half, whole = (stage_cost(dense, "stage2", [], adapter, batch=Batch(1, 8, 1), bf16=bf16) for bf16 in (True, False))
    assert whole.memory - half.memory == 2 * (parts["attention"] + parts["FFN"])
    in_full = stage_cost(dense, "stage2", [], batch=Batch(1, 8, 1), bf16=True)
    assert in_full.activations - half.activations > 2 * (parts["attention"] + parts["FFN"])


def test_recipes_and_checkpoints(write_recipe, tiny_base, tmp_path):  # noqa: F811
    recipe = write_recipe()
    budget, stages = survey(load_recipe(recipe))
    assert budget.experts == (4, 2)
    assert list(stages) == ["stage1", "stage2", "stage3"]
    sharded = write_recipe(sharding={"fsdp_size": 4, "ep_size": 2})
    assert {stage: cost.memory for stage, cost in survey(load_recipe(sharded))[1].items()} == {
        stage: cost.memory // 4 for stage, cost in stages.items()
    }
    assert list(survey(load_recipe(write_recipe(stage3__dense=True)))[1]) == ["stage1", "stage2", "dense"]
    dense, stages = survey(tiny_base / "base")
    assert dense.experts is None
    assert list(stages) == ["stage1", "stage2"]
    towers = tiny_published.write_towers(tmp_path / "towers")
    published = tmp_path / "published"
    settings = tiny_published.settings_of("qwen")
    published.mkdir()
    (published / "config.json").write_text(json.dumps(settings))  # which is all that is looked at
    budget, stages = survey(published, towers)
    assert (budget.experts, budget.moe_layers, list(stages)) == ((3, 2), [1, 2], ["stage3"])


@pytest.mark.parametrize("dense", [False, True])
def test_a_live_teacher(write_recipe, tiny_base, dense):  # noqa: F811
    """Each device has all of its weights, however the model is sharded, and its forward pass comes on top. A cached one is gone by then."""
    teacher = {"teacher": str(tiny_base / "base")}
    settings = {"stage3__dense": dense, "sharding": None if dense else {"fsdp_size": 2}}
    budget, _ = survey(tiny_base / "base")
    without, live, cached = (
        survey(load_recipe(write_recipe(**settings, stage3__distillation=distillation)))[1]["dense" if dense else "stage3"]
        for distillation in (None, teacher, teacher | {"top_k": 8})
    )
    assert live.memory - without.memory == 4 * sum(budget.total.values())
    assert live.flops - without.flops == budget.flops
    assert (cached.memory, cached.flops) == (without.memory, without.flops)
    labelled, vocabulary = live.batch.labelled, 99
    for cost in (live, cached):
        assert cost.activations - without.activations == 3 * labelled * vocabulary * 4


def test_a_teacher_in_half_precision(write_recipe, tiny_base):  # noqa: F811
    budget, _ = survey(tiny_base / "base")
    without, live = (
        survey(load_recipe(write_recipe(precision="bf16", stage3__distillation=distillation)))[1]["stage3"].memory
        for distillation in (None, {"teacher": str(tiny_base / "base")})
    )
    assert live - without == budget.weight_bytes


def test_activations_of_a_tower_with_experts(write_recipe):  # noqa: F811
    """An image in each row: 36 patches of 8 x 8 pixels."""
    places = ["language_model", "vision_tower"]
    plain, sparse = (survey(load_recipe(write_recipe(**changes)))[1] for changes in ({}, {"stage3__moe": {"moe_in": places}}))
    assert (plain["stage3"].batch.patches, sparse["stage3"].batch.patches) == (0, 4 * 36)
    assert sparse["stage1"] == plain["stage1"]
    assert sparse["stage3"].activations > plain["stage3"].activations
    shown = run_here("params", write_recipe(stage3__moe={"moe_in": places})).stdout
    assert "all with labels, each with an image of 36 patches, together" in shown


def test_settings_of_a_recipe_are_changed_on_the_command_line(write_recipe, tiny_base):  # noqa: F811
    recipe = write_recipe()
    whole, parts = (run_here("params", recipe, "--json", *more).stdout for more in ((), ("--set", "sharding={fsdp_size: 8}")))
    costs = json.loads(whole)["training_bytes"]
    assert json.loads(parts)["training_bytes"] == {stage: cost // 8 for stage, cost in costs.items()}
    assert "--set seed=1 changes a recipe, but" in refused("params", tiny_base / "base", "--set", "seed=1")


def test_the_command(tiny_base, tmp_path):  # noqa: F811
    table = run_here("params", tiny_base / "base").stdout
    assert "tower" in table
    assert "training, stage2: " in table
    found = json.loads(run_here("params", tiny_base / "base", "--json").stdout)
    assert found["language_model"]["total"] == sum(found["total"].values()) - found["total"]["tower"] - found["total"]["projector"]
    assert found["training_bytes"].keys() == found["training_flops"].keys() == {"stage1", "stage2"}
    assert "has no config.json" in refused("params", tmp_path)
