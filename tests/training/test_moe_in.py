"""Stage III with experts in the projector and the vision tower."""

import json

import pytest
import torch
import yaml
from rich.console import Console

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_model
from moe_llava.training.budget import count, stage_cost
from moe_llava.training.parts import parts_of, vision_names
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from moe_llava.training.trainable import choose_parameters
from tests.conftest import run_here, tiny_dense
from tests.training.test_distributed import torchrun
from tests.training.test_routing import logged, make_recipe, parameters, undisturbed_and_stopped  # noqa: F401

QUIET = Console(quiet=True)
PARTS = ["language_model", "projector", "vision_tower"]
EVERYWHERE = {"moe_in": PARTS}
FFNS = {
    "model.language_model.layers.0.mlp",
    "model.language_model.layers.2.mlp",
    "model.multi_modal_projector",
    "model.vision_tower.encoder.layers.0.mlp",
}


def changed(before, after):
    """Return the names of the parameters that both have and that differ."""
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


def test_experts_and_routers_everywhere_are_trained_and_nothing_else(make_recipe, tiny_base):  # noqa: F811
    """The tower's last layer has no experts: the model does not use its output."""
    (stage3,) = train(load_recipe(make_recipe(moe=EVERYWHERE)), [3], resume=False, console=QUIET)
    dense = load_model(str(tiny_base / "base"), torch.float32)
    before, after = upcycle(dense, num_experts=4, seed=0, **EVERYWHERE).state_dict(), parameters(stage3)
    assert before.keys() == after.keys()
    trained = {f"{ffn}.{part}" for ffn in FFNS for part in ("experts.down_proj", "router.weight")}
    assert trained <= changed(before, after)
    assert all(any(name.startswith((f"{ffn}.experts.", f"{ffn}.router.")) for ffn in FFNS) for name in changed(before, after))
    for line in logged(stage3):
        assert [sum(shares) for shares in line["expert_shares"]] == [pytest.approx(1, abs=1e-3)] * 4
        assert line["loss"] == pytest.approx(line["language_loss"] + 0.01 * line["balance_loss"], abs=2e-4)
        assert line["balance_loss"] > 3.9  # four layers, at least 1 each up to the choice of a mean


def test_the_dense_baseline_trains_the_same_ffns(make_recipe, tiny_base):  # noqa: F811
    (dense,) = train(load_recipe(make_recipe(moe=EVERYWHERE, dense=True)), [3], resume=False, console=QUIET)
    before, after = parameters(tiny_base / "base"), parameters(dense)
    names = changed(before, after)
    assert {ffn for ffn in FFNS if any(name.startswith(f"{ffn}.") for name in names)} == FFNS
    assert all(any(name.startswith(f"{ffn}.") for ffn in FFNS) for name in names)


def test_a_run_that_was_stopped_ends_like_one_that_was_not(make_recipe, stopping):  # noqa: F811
    moe = EVERYWHERE | {"router_bias_rate": 0.01, "granularity": 2, "num_shared_experts": 1}
    expected, found = undisturbed_and_stopped(make_recipe, stopping, moe)
    assert expected["model.multi_modal_projector.router.load_bias.bias"].any()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_two_processes_end_like_one(make_recipe, tmp_path):  # noqa: F811
    """The balance loss counts the patches of both."""
    train(load_recipe(make_recipe("one", moe=EVERYWHERE, optimisation__max_steps=2)), [3], resume=False, console=QUIET)
    two = make_recipe("two", moe=EVERYWHERE, optimisation__max_steps=2, optimisation__per_device_batch_size=2)
    torchrun("train", two, "--stage", "3")
    expected, found = (parameters(tmp_path / name / "stage3") for name in ("one", "two"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_two_processes_without_any_image(make_recipe, tiny_base, tmp_path):  # noqa: F811
    """Each batch gets an empty image, so that every expert takes part in every step."""
    records = json.loads((tiny_base / "data" / "train.json").read_text())
    for record in records:
        record.pop("image")
        for turn in record["conversations"]:
            turn["value"] = turn["value"].replace("<image>", "").strip()
    (tmp_path / "text.json").write_text(json.dumps(records))
    file = make_recipe("text", moe=EVERYWHERE, optimisation__max_steps=2, optimisation__per_device_batch_size=2)
    raw = yaml.safe_load(file.read_text())
    raw["stage3"]["data"]["file"] = str(tmp_path / "text.json")
    file.write_text(yaml.safe_dump(raw))
    torchrun("train", file, "--stage", "3")
    assert [len(line["expert_shares"]) for line in logged(tmp_path / "text" / "stage3")] == [4, 4]


def test_continuing_needs_the_same_places(make_recipe, write_recipe, tmp_path):  # noqa: F811
    (stage3,) = train(load_recipe(make_recipe(moe=EVERYWHERE, optimisation__max_steps=1)), [3], resume=False, console=QUIET)
    again = {"model": str(stage3), "output": str(tmp_path / "again"), "stage3__optimisation__max_steps": 1}
    with pytest.raises(RecipeError, match=r"has moe_in \['language_model', 'projector', 'vision_tower'\], but stage3.moe.moe_in says"):
        train(load_recipe(write_recipe(**again)), [3], resume=False, console=QUIET)
    (more,) = train(load_recipe(write_recipe(**again, stage3__moe=EVERYWHERE)), [3], resume=False, console=QUIET)
    assert len(logged(more)[0]["expert_shares"]) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe": {"moe_in": ["vision"]}}, "stage3.moe.moe_in is ['vision'], but must name some of language_model, projector, vision_tower"),
        ({"moe": EVERYWHERE, "adapter": {"targets": ["experts"]}}, "stage3.adapter is set, but stage3.moe.moe_in is ['language_model', "),
        ({"moe": {"moe_in": "projector"}}, "stage3.moe.moe_in is 'projector', but must be a list"),
    ],
)
def test_settings_that_do_not_go_together(make_recipe, settings, message):  # noqa: F811
    with pytest.raises(RecipeError) as error:
        load_recipe(make_recipe(**settings))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"feature_cache": "cache"}, "feature_cache is set, but stage3.moe.moe_in has vision_tower, whose features change in training"),
        ({"sharding": {"fsdp_size": 2}}, "sharding is set, but stage3.moe.moe_in is ['language_model', 'projector', 'vision_tower']"),
    ],
)
def test_settings_of_the_run_that_do_not_go_with_it(make_recipe, setting, message):  # noqa: F811
    file = make_recipe(moe=EVERYWHERE)
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | setting))
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    assert message in str(error.value)


def test_features_of_the_tower_may_be_cached_for_experts_in_the_projector(make_recipe, tmp_path):  # noqa: F811
    file = make_recipe("cached", moe={"moe_in": PARTS[:2]})
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"feature_cache": str(tmp_path / "cache")}))
    (cached,) = train(load_recipe(file), [3], resume=False, console=QUIET)
    (plain,) = train(load_recipe(make_recipe("plain", moe={"moe_in": PARTS[:2]})), [3], resume=False, console=QUIET)
    expected, found = parameters(plain), parameters(cached)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_recipe_whose_model_has_no_such_part_is_refused_before_the_first_step(make_recipe):  # noqa: F811
    with pytest.raises(ValueError, match="tower 0: granularity is 3, but must divide the width of the FFN, 32"):
        train(load_recipe(make_recipe(moe=EVERYWHERE | {"granularity": 3})), [3], resume=False, console=QUIET)


def sparse(**options):
    return upcycle(tiny_dense("llama"), num_experts=4, **options)


def test_counted_by_hand():
    """Widths: tower 16, its FFN 32; projector 16 -> 32 -> 32. A patch uses 2 of 4 experts."""
    plain, everywhere = count(sparse()), count(sparse(**EVERYWHERE))
    tower, projector = 16 * 32 + 32 + 32 * 16 + 16, 16 * 32 + 32 + 32 * 32 + 32  # one FFN
    for part, ffn in (("tower", tower), ("projector", projector)):
        assert everywhere.total[part] - plain.total[part] == 3 * ffn + 4 * 16
        assert everywhere.active[part] - plain.active[part] == ffn + 4 * 16
    assert everywhere.language_model == plain.language_model
    assert (everywhere.flops, everywhere.vision) == (plain.flops, ["tower 0", "projector"])
    model = sparse(**EVERYWHERE)
    names = vision_names(model)
    counts = choose_parameters(model, "stage3", model.config.moe_layer_indices, list(names)).trained
    assert counts["vision experts"] == 4 * (tower + projector)
    assert counts["vision routers"] == 2 * 4 * 16
    assert {parts_of(model)[f"{name}.router.weight"] for name in names} == {"tower", "projector"}


def test_training_everything_adds_the_tower():
    """tuned: all trains projector and language model, and what is sparse in the tower."""
    model = sparse(**EVERYWHERE)
    counts = choose_parameters(model, "stage2", model.config.moe_layer_indices, list(vision_names(model))).trained
    tower = model.vision_mlps()["tower 0"]
    assert counts["vision experts"] == sum(parameter.numel() for parameter in tower.experts.parameters())
    assert counts["vision routers"] == tower.router.weight.numel()
    assert all(parameter.requires_grad for parameter in model.model.multi_modal_projector.parameters())
    assert sum(parameter.requires_grad for parameter in model.model.vision_tower.parameters()) == 5


def test_their_training_costs_memory_and_gradients_of_the_whole_language_model():
    model = sparse(**EVERYWHERE)
    layers = model.config.moe_layer_indices
    inside = stage_cost(model, "stage3", layers)
    both = stage_cost(model, "stage3", layers, vision=list(vision_names(model)))
    experts = [parameter for mlp in model.vision_mlps().values() for parameter in mlp.parameters()]
    assert both.memory - inside.memory == 12 * sum(parameter.numel() for parameter in experts)
    attention, scores = 2 * (2 * 32 * 32 + 2 * 32 * 16), 2 * 4 * 32 * 2048
    assert both.flops - inside.flops == attention + scores + 2 * (2 * 2 * 32 * 48 + 4 * 32)  # of layer 0, up to the activations


def test_the_commands(tiny_base, tmp_path):
    places = [word for part in PARTS for word in ("--moe-in", part)]
    done = run_here("upcycle", tiny_base / "base", tmp_path / "sparse", *places)
    assert done.exit_code == 0, done.stderr
    assert "sparse layers [0, 2, 'tower 0', 'projector']" in done.stdout
    shown = run_here("params", tmp_path / "sparse").stdout
    assert "2 of them sparse (0, 2), tower 0, projector: 4 experts, a token uses 2" in shown
