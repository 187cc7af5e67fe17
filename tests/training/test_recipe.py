"""Recipes: every problem at once, with a hint for the misspelt."""

from pathlib import Path

import pytest
import yaml

from moe_llava.model.options import MoeOptions
from moe_llava.training.parsing import read
from moe_llava.training.recipe import RecipeError, load_recipe
from tests.conftest import REPOSITORY

DIGITS = REPOSITORY / "recipes" / "digits.yaml"


@pytest.mark.parametrize("file", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_read(file):
    recipe = load_recipe(file)
    assert recipe.stage3.options.num_experts_per_tok <= recipe.stage3.options.num_experts


def test_without_a_section_the_options_are_the_defaults():
    assert load_recipe(DIGITS, ["stage3.moe=null"]).stage3.options == MoeOptions()


def changed(tmp_path: Path, change) -> Path:
    raw = yaml.safe_load(DIGITS.read_text())
    change(raw)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def test_all_problems_are_reported_at_once(tmp_path):
    def spoil(raw):
        raw["stage1"]["optimisation"]["learning_rat"] = 1
        raw["precision"] = "fp8"
        raw["stage2"]["optimisation"]["batch_size"] = "big"
        del raw["stage3"]["data"]
        raw["colour"] = "red"

    with pytest.raises(RecipeError) as error:
        load_recipe(changed(tmp_path, spoil))
    text = str(error.value)
    assert "unknown key stage1.optimisation.learning_rat; did you mean stage1.optimisation.learning_rate?" in text
    assert "precision is 'fp8', but must be one of auto, bf16, fp32" in text
    assert "stage2.optimisation.batch_size is 'big', but must be a whole number" in text
    assert "stage3.data is missing" in text
    assert "unknown key colour; known: model, output" in text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stage3.moe.num_experts_per_tok=5", "num_experts_per_tok is 5, but must lie in 1..num_experts=4"),
        ("stage1.optimisation.batch_size=3", "batch_size is 3, but must be a multiple of per_device_batch_size=32"),
        ("stage1.optimisation.learning_rate=0", "learning_rate is 0, but must be above 0"),
        ("stage1.optimisation.per_device_batch_size=true", "is True, but must be a whole number"),
        ("stage1", "--set stage1: expected a.b=value"),
        ("logging_steps=0", "logging_steps is 0, but must be above 0"),
        ("stage1.optimisation.max_steps=0", "max_steps is 0, but must be -1, or above 0"),
        ("stage1.optimisation.warmup_ratio=-1", "warmup_ratio is -1, but must be at least 0"),
        ("stage3.moe.capacity_factor=-1.0", "capacity_factor is -1.0, but must be above 0"),
        ("stage3.moe.moe_layers=[0", "'[0' is not YAML"),
        ("model.x=1", "--set model.x=1: model holds a value"),
        ("output=2026-01-01", "output is datetime.date(2026, 1, 1), but must be text"),
        ("seed=1.0", "seed is 1.0, but must be a whole number"),
        ("torch_compile=1", "torch_compile is 1, but must be true or false"),
        ("stage1=3", "stage1 is 3, but must be a mapping of settings, or null"),
    ],
)
def test_settings_that_break_a_rule(setting, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(DIGITS, [setting])
    assert message in str(error.value)


def test_settings_change_the_recipe():
    recipe = load_recipe(
        DIGITS, ["stage1.optimisation.learning_rate=3e-4", "stage3.moe.moe_layers=[0, 1]", "seed=7", "stage3.moe.capacity_factor=1.5"]
    )
    assert recipe.stage1.optimisation.learning_rate == 3e-4
    assert recipe.stage3.moe.moe_layers == [0, 1]
    assert recipe.stage3.moe.capacity_factor == 1.5
    assert recipe.seed == 7


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- a", "must hold a mapping")])
def test_files_that_are_no_recipe(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "bad.yaml")


def test_missing_recipe(tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")


def test_several_files_and_a_template(write_recipe):
    file = write_recipe()
    raw = yaml.safe_load(file.read_text())
    first = raw["stage2"]["data"]
    raw["stage2"]["data"] = [first, {**first, "weight": 0.5}]
    raw["stage2"]["template"] = "phi"
    file.write_text(yaml.safe_dump(raw))
    recipe = load_recipe(file)
    assert [source.weight for source in recipe.stage2.sources] == [1.0, 0.5]
    assert recipe.stage1.sources == [recipe.stage1.data]
    raw["stage2"]["data"][1] |= {"weight": 0, "fil": "x"}
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(RecipeError, match=r"unknown key stage2.data.1.fil; did you mean stage2.data.1.file"):
        load_recipe(file)
    del raw["stage2"]["data"][1]["fil"]
    raw["stage2"]["template"] = "fi"
    raw["stage3"]["data"] = []
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    for problem in ("stage2.data.1.weight is 0, but must be above 0", "stage2.template is 'fi'", "or a list that is not empty"):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": "tensorboard"}, "report_to is 'tensorboard', but must be a list"),
        ({"model": 5}, "model is 5, but must be text, or a mapping of settings"),
        ({"stage1__data": "foo.json"}, "stage1.data is 'foo.json', but must be a mapping of settings, or a list"),
        ({"seed": -1}, "seed is -1, but must be at least 0"),
        ({"dataloader_workers": -2}, "dataloader_workers is -2, but must be at least 0"),
        ({"stage1__optimisation__learning_rate": float("nan")}, "stage1.optimisation.learning_rate is nan, but must be a finite number"),
        ({"stage1__optimisation__weight_decay": -3.0}, "stage1.optimisation.weight_decay is -3.0, but must be at least 0"),
        ({"stage1__data__weight": float("inf")}, "stage1.data.weight is inf, but must be a finite number"),
    ],
)
def test_values_that_make_no_sense(write_recipe, settings, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(**settings))


NUMBERS = [
    *(f"stage1.optimisation.{key}" for key in ("learning_rate", "epochs", "warmup_ratio", "weight_decay", "max_grad_norm")),
    *(f"stage3.moe.{key}" for key in ("router_aux_loss_coef", "router_z_loss_coef", "router_mi_loss_coef", "capacity_factor")),
    "stage2.data.weight",
]


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999", "1" + "0" * 400])
@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_is_finite(key, value):
    with pytest.raises(RecipeError, match=rf"{key} is \S+, but must be a finite number"):
        load_recipe(DIGITS, [f"{key}={value}"])


def test_a_list_and_an_adapter_hold_finite_numbers_too(tmp_path):
    def change(raw):
        raw["stage2"]["data"] = [raw["stage2"]["data"] | {"weight": float("nan")}]
        raw["stage2"]["adapter"] = {"targets": ["attention"], "dropout": float("inf")}
        raw["stage3"]["moe"]["moe_layers"] = [0, float("nan")]

    with pytest.raises(RecipeError) as caught:
        load_recipe(changed(tmp_path, change))
    for key in ("stage2.data.0.weight is nan", "stage2.adapter.dropout is inf"):
        assert f"{key}, but must be a finite number" in str(caught.value)
    assert "stage3.moe.moe_layers.1 is nan, but must be a whole number" in str(caught.value)


@pytest.mark.parametrize("key", ["router_aux_loss_coef", "router_z_loss_coef", "router_mi_loss_coef"])
def test_no_loss_has_a_negative_weight(key):
    with pytest.raises(RecipeError, match=f"stage3.moe.{key} is -1.0, but must be at least 0"):
        load_recipe(DIGITS, [f"stage3.moe.{key}=-1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage3: {}\nseed: 1\nstage3: {}\n", "line 3: the key stage3 stands in this mapping already, in line 1"),
        ("stage1:\n  optimisation:\n    epochs: 1\n    epochs: 1\n", "line 4: the key epochs stands in this mapping already, in line 3"),
        ("stage1: {data: [{file: a, images: b, 'file': c}]}\n", "line 1: the key file stands in this mapping already, in line 1"),
        ('seed: 1\r\n\r\n"seed": 2\r\n', "line 3: the key seed stands in this mapping already, in line 1"),
    ],
)
def test_a_key_that_stands_twice(tmp_path, text, message):
    file = tmp_path / "twice.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=f"{file}, {message}"):
        load_recipe(file)
    (tmp_path / "above.yaml").write_text("base: twice.yaml\n")
    with pytest.raises(RecipeError, match=f"{file}, {message}"):
        load_recipe(tmp_path / "above.yaml")


def test_a_key_that_stands_twice_on_the_command_line():
    with pytest.raises(RecipeError, match=r"--set stage1=\{seed: 1, seed: 1\}: line 1: the key seed stands in this mapping already"):
        load_recipe(DIGITS, ["stage1={seed: 1, seed: 1}"])


def test_a_key_that_also_comes_by_a_merge_is_no_duplicate(tmp_path):
    """Also where the mapping that is merged is read after the one that it is merged into."""
    file = tmp_path / "merged.yaml"
    file.write_text("a: {x: &low {p: 1, q: 1}}\nb: {y: {z: &high {<<: *low, p: 2}}}\nc: {<<: *high, q: 3}\n")
    assert read(file)["c"] == {"p": 2, "q": 3}


def test_a_key_that_is_a_number_is_unknown(tmp_path):
    with pytest.raises(RecipeError, match="unknown key 1; known: model, output"):
        load_recipe(changed(tmp_path, lambda raw: raw.update({1: 2})))


def test_no_date_is_no_traceback(tmp_path):
    (tmp_path / "date.yaml").write_text("seed: 2026-13-45\n")
    with pytest.raises(RecipeError, match=r"date.yaml is not YAML in UTF-8: month must be in 1..12"):
        load_recipe(tmp_path / "date.yaml")


def test_the_options_that_are_given_are_known():
    recipe = load_recipe(DIGITS, ["stage3.moe={num_experts: 4, capacity_factor: null}"])
    assert recipe.stage3.given == {"num_experts": 4}  # its default
    assert recipe.stage3.options == MoeOptions()
