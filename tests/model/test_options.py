"""MoeOptions: every option is known wherever options are given, with one default, one description and one set of bounds."""

import dataclasses
import re
from pathlib import Path

import pytest
import typer

from moe_llava import MoeLlavaConfig, MoeOptions, upcycle
from moe_llava.cli import app
from moe_llava.training.recipe import RecipeError, load_recipe
from tests.conftest import tiny_dense

ROOT = Path(__file__).parents[2]
FIELDS = dataclasses.fields(MoeOptions)
DEFAULTS = dataclasses.asdict(MoeOptions())
OTHERS = {
    "num_experts": 8,
    "num_experts_per_tok": 1,
    "moe_layers": [1],
    "moe_in": ["language_model", "projector"],
    "granularity": 2,
    "num_shared_experts": 1,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.5,
    "balance_over": "sequence",
    "router_bias_rate": 0.5,
    "router_z_loss_coef": 0.5,
    "capacity_factor": 1.5,
    "use_residual": True,
    "routing": "smoes",
    "expert_bin_size": 1,
    "router_mi_loss_coef": 0.5,
}
OUT_OF_BOUNDS = {
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "moe_layers": "none",
    "moe_in": ["none"],
    "router_aux_loss_coef": -1.0,
    "router_z_loss_coef": -1.0,
    "capacity_factor": 0.0,
    "routing": "none",
    "expert_bin_size": 0,
    "router_mi_loss_coef": -1.0,
}
COMMAND = next(command for command in typer.main.get_command(app).commands.values() if command.name == "upcycle")


@pytest.mark.parametrize("f", FIELDS, ids=lambda f: f.name)
def test_every_option_is_known_everywhere(f):
    """The configuration, `upcycle`, a recipe and the command line take each option; by default all have the same value."""
    other = OTHERS[f.name]
    default = DEFAULTS[f.name]
    assert getattr(MoeLlavaConfig(), f.name) == default
    assert getattr(MoeLlavaConfig(**{f.name: other}), f.name) == other
    assert getattr(upcycle(tiny_dense("llama"), **{f.name: other}).config, f.name) == other
    recipe = ROOT / "recipes" / "digits.yaml"
    assert getattr(load_recipe(recipe, [f"stage3.moe.{f.name}={other}"]).stage3.moe, f.name) == other
    (option,) = (parameter for parameter in COMMAND.params if parameter.name == f.name)
    assert (option.default, option.help) == (default, f.metadata["description"])


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_every_bound_is_checked_everywhere(name):
    value = OUT_OF_BOUNDS[name]
    rule = re.escape(f"{name} is {value!r}, but must ") + "(be|name)"
    with pytest.raises(ValueError, match=rule):
        MoeLlavaConfig(**{name: value})
    with pytest.raises(ValueError, match=rule):
        upcycle(tiny_dense("llama"), **{name: value})
    with pytest.raises(RecipeError, match=f"stage3.moe.{rule}"):
        load_recipe(ROOT / "recipes" / "digits.yaml", [f"stage3.moe.{name}={value}"])


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *(("num_experts", value, "must be a whole number") for value in (None, "4", 2.5, True)),
        ("moe_layers", 3, "must be a name, or a list of layer indices"),
        ("moe_layers", ["all"], "must be a name, or a list of layer indices"),
        ("moe_in", "projector", "must be a list of names"),
        ("capacity_factor", "1.0", "must be a number, or null"),
        ("router_z_loss_coef", None, "must be a number"),
        ("use_residual", 1, "must be true or false"),
    ],
)
def test_every_option_has_a_type(name, value, rule):
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}, but {rule}")):
        MoeLlavaConfig(**{name: value})


def test_a_number_is_finite():
    with pytest.raises(ValueError, match="router_z_loss_coef is nan, but must be finite"):
        MoeLlavaConfig(router_z_loss_coef=float("nan"))
    with pytest.raises(ValueError, match="capacity_factor is inf, but must be finite"):
        MoeLlavaConfig(capacity_factor=float("inf"))


def test_all_problems_at_once():
    with pytest.raises(ValueError, match=r"num_experts is 0.*; router_aux_loss_coef is -1"):
        MoeLlavaConfig(num_experts=0, router_aux_loss_coef=-1)


def test_options_as_one_object():
    options = MoeOptions(num_experts=3, moe_layers="all")
    config = upcycle(tiny_dense("llama"), options, num_experts_per_tok=1).config
    assert (config.num_experts, config.moe_layers, config.num_experts_per_tok) == (3, "all", 1)
    assert options.num_experts_per_tok == 2


def test_an_unknown_option():
    with pytest.raises(TypeError, match="num_expert"):
        upcycle(tiny_dense("llama"), num_expert=4)


def test_the_table_in_the_documentation():
    shown = {name: "null" if value is None else str(value).replace("'", "").lower() for name, value in DEFAULTS.items()}
    rows = [f"| `{f.name}` | {shown[f.name]} | {f.metadata['description']} |" for f in FIELDS]
    assert "\n".join(rows) in (ROOT / "docs" / "training.md").read_text()
