"""Stage III with routing by modality, and with experts that differ from the start."""

import json
import shutil

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForImageTextToText

from moe_llava import upcycle
from moe_llava.checkpoints.load import load_checkpoint, load_config
from moe_llava.training.checks import check_start
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from moe_llava.training.stage import Stage
from tests.conftest import run_here
from tests.training.test_distributed import torchrun

QUIET = Console(quiet=True)
SMOES = {"routing": "smoes", "router_aux_loss_coef": 0.001, "router_mi_loss_coef": 0.1}


@pytest.fixture
def make_recipe(write_recipe, tiny_base, tmp_path):
    """A recipe whose stage III can start: stage II has left the tiny base as it was."""

    def make(name="run", **settings):
        file = write_recipe(output=str(tmp_path / name), **{f"stage3__{key}": value for key, value in settings.items()})
        shutil.copytree(tiny_base / "base", tmp_path / name / "stage2", dirs_exist_ok=True)
        return file

    return make


def parameters(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def logged(folder):
    return [entry for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in entry]


@pytest.mark.parametrize(
    "settings",
    [
        {"moe": {"routing": "modality_split"}},
        {"moe": SMOES},
        {"moe": {}, "expert_start": "noise"},
        {"moe": {"routing": "modality_split", "capacity_factor": 1.0, "use_residual": True}},
        {"moe": SMOES | {"capacity_factor": 1.0, "use_residual": True, "moe_layers": "all"}, "expert_start": "noise"},
    ],
    ids=str,
)
def test_stage_3_of_each_kind(make_recipe, settings):
    recipe = load_recipe(make_recipe(**settings))
    (stage3,) = train(recipe, [3], resume=False, console=QUIET)
    moe = recipe.stage3.options
    config = load_config(stage3)
    assert config.routing == moe.routing
    lines = logged(stage3)
    assert len(lines) == 3
    for line in lines:
        expected = line["language_loss"] + moe.router_aux_loss_coef * line["balance_loss"]
        if moe.routing == "smoes":
            expected += moe.router_mi_loss_coef * line["mi_loss"]
        assert line["loss"] == pytest.approx(expected, abs=2e-4)
        assert ("mi_loss" in line) == (moe.routing == "smoes")
    if moe.routing == "smoes":
        assert lines[0]["mi_loss"] == pytest.approx(0, abs=1e-6)  # nothing is known yet
        assert lines[-1]["mi_loss"] < 0
        found = parameters(stage3)
        assert all(found[name].sum(-1).tolist() == pytest.approx([1, 1]) for name in found if name.endswith("statistics.load"))


def undisturbed_and_stopped(make_recipe, stopping, moe):
    """The parameters of stage III after five steps in one go, and after three steps, a stop and two more."""
    file = make_recipe(moe=moe, optimisation__max_steps=5, optimisation__gradient_checkpointing=True)
    (whole,) = train(load_recipe(file), [3], resume=False, console=QUIET)
    expected = parameters(whole)
    shutil.rmtree(whole)

    with stopping(3):
        train(load_recipe(file), [3], resume=False, console=QUIET)
    assert not whole.exists()
    train(load_recipe(file), [3], resume=True, console=QUIET)
    return expected, parameters(whole)


@pytest.mark.parametrize("moe", [SMOES, {"router_bias_rate": 0.01, "granularity": 2, "num_shared_experts": 1}], ids=["smoes", "bias"])
def test_a_run_with_buffers_that_was_stopped_ends_like_one_that_was_not(make_recipe, tmp_path, stopping, moe):
    expected, found = undisturbed_and_stopped(make_recipe, stopping, moe)
    assert any(".statistics." in name or found[name].any() for name in found if ".statistics." in name or name.endswith("load_bias.bias"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_two_processes_keep_the_statistics_of_one(make_recipe, tmp_path):
    """The mutual information loss is of what a process sees, so it is switched off here; the statistics are of all processes together."""
    quiet = SMOES | {"router_mi_loss_coef": 0.0}
    train(load_recipe(make_recipe("one", moe=quiet, optimisation__max_steps=2)), [3], resume=False, console=QUIET)
    two = make_recipe("two", moe=quiet, optimisation__max_steps=2, optimisation__per_device_batch_size=2)
    torchrun("train", two, "--stage", "3")
    expected, found = (parameters(tmp_path / name / "stage3") for name in ("one", "two"))
    names = [name for name in expected if ".statistics." in name]
    assert len(names) == 6
    for name in names:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_going_on_from_a_sparse_model_routing_may_change(make_recipe, write_recipe, tmp_path):
    (stage3,) = train(load_recipe(make_recipe(moe={})), [3], resume=False, console=QUIET)
    again = {"model": str(stage3), "output": str(tmp_path / "again")}
    (smoes,) = train(load_recipe(write_recipe(**again, stage3__moe=SMOES)), [3], resume=False, console=QUIET)
    assert logged(smoes)[-1]["mi_loss"] < 0
    with pytest.raises(RecipeError, match=r"sparse already, but stage3\.expert_start is noise, which is for experts that are made here"):
        train(load_recipe(write_recipe(**{**again, "output": str(tmp_path / "other")}, stage3__expert_start="noise")), [3], False, QUIET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe": {"routing": "smooes"}}, "stage3.moe.routing is 'smooes', but must be one of agnostic, modality_split, smoes"),
        (
            {"moe": {"routing": "modality_split", "num_experts": 5}},
            "stage3.moe.num_experts is 5, but must be even for routing modality_split",
        ),
        (
            {"moe": {"routing": "modality_split", "num_experts_per_tok": 3}},
            "stage3.moe.num_experts_per_tok is 3, but must lie in 1..2 for routing modality_split: half of num_experts=4",
        ),
        ({"moe": {"routing": "smoes", "expert_bin_size": 3}}, "stage3.moe.expert_bin_size is 3, but must divide the 4 experts of a layer"),
        ({"moe": {"router_mi_loss_coef": -1.0}}, "stage3.moe.router_mi_loss_coef is -1.0, but must be at least 0"),
        ({"expert_start": "nois"}, "stage3.expert_start is 'nois', but must be one of copy, noise, drop"),
        ({"moe": SMOES, "adapter": {"targets": ["attention"]}}, "stage3.adapter is set, but stage3.moe.routing is smoes"),
    ],
)
def test_settings_that_do_not_go_together(make_recipe, settings, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(make_recipe(**settings))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (SMOES, "has routing smoes, but stage3.moe.routing says agnostic, and its weights hold buffers of that option"),
        (
            {"router_bias_rate": 0.01},
            "has router_bias_rate 0.01, but stage3.moe.router_bias_rate says 0.0, and its weights hold buffers",
        ),
    ],
)
def test_options_with_buffers_are_not_left_out(write_recipe, tiny_base, tmp_path, moe, message):
    model, processor = load_checkpoint(tiny_base / "base")
    for part in (upcycle(model, **moe), processor):
        part.save_pretrained(tmp_path / "sparse")
    with pytest.raises(RecipeError, match=message):
        check_start(Stage(load_recipe(write_recipe(model=str(tmp_path / "sparse"))), 3))


def test_the_command_upcycles_with_routing_and_noise(tiny_base, tmp_path):
    done = run_here("upcycle", tiny_base / "base", tmp_path / "sparse", "--routing", "smoes", "--expert-start", "noise")
    assert done.exit_code == 0, done.stderr
    assert load_config(tmp_path / "sparse").routing == "smoes"
    experts = parameters(tmp_path / "sparse")["model.language_model.layers.0.mlp.experts.down_proj"]
    assert not torch.equal(experts[0], experts[1])


def test_a_recipe_written_before_routing_was_known_is_agnostic(make_recipe):
    file = make_recipe(moe={"num_experts": 4})
    raw = yaml.safe_load(file.read_text())
    assert "routing" not in raw["stage3"]["moe"]
    recipe = load_recipe(file)
    assert (recipe.stage3.options.routing, recipe.stage3.expert_start) == ("agnostic", "copy")
