"""Stages end to end on a tiny model: what they leave behind, what they train, how they stop and go on."""

import io
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, TrainingArguments

from moe_llava import MoeLlavaForConditionalGeneration, MoeLlavaProcessor, upcycle
from moe_llava.checkpoints.files import read_examples
from moe_llava.checkpoints.load import load_config
from moe_llava.common.errors import CheckpointError, DataError
from moe_llava.training.recipe import RecipeError, load_recipe
from moe_llava.training.run import train
from moe_llava.training.start import start
from moe_llava.training.watch import summarise

QUIET = Console(quiet=True)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def parameters(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_three_stages_and_the_dense_control(write_recipe, tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe())
    models = []

    def start_alone(stage, save):
        assert [model for model in models if model() is not None] == [], "the model of an earlier stage is still in memory"
        model, processor = start(stage, save)
        models.append(weakref.ref(model))
        return model, processor

    monkeypatch.setattr("moe_llava.training.run.start", start_alone)
    stage1, stage2, stage3 = train(recipe, [1, 2, 3], resume=False, console=QUIET)
    assert len(models) == 3
    recipe.stage3.dense = True
    (dense,) = train(recipe, [3], resume=False, console=QUIET)
    assert dense == tmp_path / "run" / "dense"
    for folder, kind in (
        (stage1, LlavaForConditionalGeneration),
        (stage2, LlavaForConditionalGeneration),
        (dense, LlavaForConditionalGeneration),
    ):
        assert type(AutoModelForImageTextToText.from_pretrained(folder)) is kind
    assert type(AutoModelForImageTextToText.from_pretrained(stage3)) is MoeLlavaForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(stage3)) is MoeLlavaProcessor

    def changed(before, after):
        return {name for name in after if name in before and not torch.equal(before[name], after[name])}

    first, one, two, control = (parameters(folder) for folder in (recipe.model, stage1, stage2, dense))
    assert changed(first, one) == {name for name in one if "multi_modal_projector" in name}
    assert changed(one, two) == {name for name in two if "vision_tower" not in name}
    assert changed(two, control) == {name for name in two if "language_model.layers.0.mlp" in name or "language_model.layers.2.mlp" in name}
    sparse = parameters(stage3)
    assert changed(two, sparse) == set()  # what the sparse model shares with stage II is frozen
    start_of_3 = upcycle(AutoModelForImageTextToText.from_pretrained(stage2), seed=recipe.seed).state_dict()
    assert changed(start_of_3, sparse) == {name for name in sparse if ".experts." in name or ".router." in name}

    questions = [turn["value"] for record in json.loads(Path(recipe.stage3.data.file).read_text()) for turn in record["conversations"][:1]]
    assert set(read_examples(stage3)) <= {question.replace("<image>", "").strip() for question in questions}
    assert len(read_examples(stage3)) == 3

    lines = [line for line in log(stage3) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["loss"] == pytest.approx(line["language_loss"] + 0.01 * line["balance_loss"], abs=2e-4)
        assert [len(layer) for layer in line["expert_shares"]] == [4, 4]
        assert all(sum(layer) == pytest.approx(1, abs=1e-3) for layer in line["expert_shares"])
        assert "balance" in summarise(line)
    assert not list(stage3.glob("checkpoint-*"))
    assert not list((tmp_path / "run").glob(".*"))
    assert load_recipe(stage3 / "recipe.yaml").stage3.moe == recipe.stage3.moe


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(write_recipe, put_stage, tmp_path, stopping, monkeypatch, number):
    """The model is loaded once, from the save: neither that which the stage began with, nor that which the save is copied over."""
    file = write_recipe(**{f"stage{number}__optimisation__max_steps": 5})
    put_stage(number - 1)
    (whole,) = train(load_recipe(file), [number], resume=False, console=QUIET)
    expected = parameters(whole)
    kept = tmp_path / "whole"
    whole.rename(kept)

    with stopping(3):
        train(load_recipe(file), [number], resume=False, console=QUIET)
    assert not whole.exists()
    with pytest.raises(RecipeError, match="exists already, finished or not: continue with --resume"):
        train(load_recipe(file), [number], resume=False, console=QUIET)
    for name in ("load_checkpoint", "upcycle"):
        monkeypatch.delattr(f"moe_llava.training.start.{name}")
    train(load_recipe(file), [number], resume=True, console=QUIET)
    for line in log(whole):
        if "language_loss" in line:
            assert line["loss"] == pytest.approx(line["language_loss"] + 0.01 * line["balance_loss"], abs=2e-4)
    got = parameters(whole)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    for name in ("config.json", "generation_config.json", "processor_config.json"):
        assert (whole / name).read_text() == (kept / name).read_text()
    assert [line["tokens"] for line in log(whole) if "loss" in line] == [line["tokens"] for line in log(kept) if "loss" in line]


@pytest.mark.parametrize("dense", [False, True])
def test_stage_III_of_all_parameters_learns_what_stage_II_does(write_recipe, put_stage, dense):
    recipe = load_recipe(write_recipe(stage3__tuned="all", stage3__dense=dense))
    put_stage(2)
    (three,) = train(recipe, [3], resume=False, console=QUIET)
    before, after = parameters(recipe.model), parameters(three)
    same = {name for name in after if name in before and torch.equal(before[name], after[name])}
    assert same == {name for name in before if "vision_tower" in name}
    assert any(".experts." in name for name in after) != dense


def test_tokens_between_two_logged_steps_are_counted_by_a_run_that_goes_on(write_recipe, stopping):
    settings = {"logging_steps": 4, "save_steps": 3, "stage1__optimisation__max_steps": 5}
    (whole,) = train(load_recipe(write_recipe(**settings)), [1], resume=False, console=QUIET)
    expected = log(whole)[-2]["tokens"]
    shutil.rmtree(whole)

    with stopping(4):
        train(load_recipe(write_recipe(**settings)), [1], resume=False, console=QUIET)
    train(load_recipe(write_recipe(**settings)), [1], resume=True, console=QUIET)
    assert log(whole)[-2]["tokens"] == expected > 0


def test_finished_stages_are_kept(write_recipe, tmp_path):
    recipe = load_recipe(write_recipe())
    (stage1,) = train(recipe, [1], resume=False, console=QUIET)
    before = (stage1 / "model.safetensors").stat().st_mtime_ns
    train(recipe, [1], resume=True, console=QUIET)
    assert (stage1 / "model.safetensors").stat().st_mtime_ns == before


def test_neither_loss_depends_on_gradient_accumulation(write_recipe, put_stage, tmp_path):
    """One row in four accumulation steps against four rows at once.

    Language loss and its gradient are the same to rounding. The balance loss multiplies two means over the batch it sees, so rows one
    by one give another value than rows together; what must not happen is that accumulation multiplies it. To see just that, all rows
    are alike.
    """
    file = write_recipe(stage3__moe__router_aux_loss_coef=1.0, stage3__optimisation__max_steps=1, stage3__optimisation__warmup_ratio=0.0)
    put_stage(2)
    recipe = load_recipe(file)
    records = json.loads(Path(recipe.stage3.data.file).read_text())[:1] * 8
    (tmp_path / "same.json").write_text(json.dumps(records))
    recipe.stage3.data.file = str(tmp_path / "same.json")
    lines, weights = [], []
    for rows in (1, 4):
        recipe.stage3.optimisation.per_device_batch_size = rows
        (stage3,) = train(recipe, [3], resume=False, console=QUIET)
        lines.append(next(line for line in log(stage3) if "loss" in line))
        weights.append(parameters(stage3))
        shutil.rmtree(stage3)
    for key in ("loss", "language_loss", "balance_loss", "grad_norm"):
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-4), key
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=0)


def test_accumulation_over_different_rows(write_recipe, put_stage):
    """The same with different rows: language loss equal, balance loss within what the means allow."""
    file = write_recipe(stage3__optimisation__max_steps=1)
    put_stage(2)
    lines = []
    for rows in (1, 4):
        recipe = load_recipe(file, [f"stage3.optimisation.per_device_batch_size={rows}"])
        (stage3,) = train(recipe, [3], resume=False, console=QUIET)
        lines.append(next(line for line in log(stage3) if "loss" in line))
        shutil.rmtree(stage3)
    assert lines[0]["language_loss"] == pytest.approx(lines[1]["language_loss"], rel=1e-4)
    assert lines[0]["balance_loss"] == pytest.approx(lines[1]["balance_loss"], rel=0.05)


def test_gradient_checkpointing_and_bf16_run(write_recipe):
    recipe = load_recipe(write_recipe(precision="bf16", stage1__optimisation__gradient_checkpointing=True))
    (stage1,) = train(recipe, [1], resume=False, console=QUIET)
    assert parameters(stage1)["model.multi_modal_projector.linear_1.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"attention": "eagre"}, ValueError, "eagre"),
        ({"stage2__data__file": "none.json"}, DataError, "data file none.json does not exist"),
        ({"model": "nowhere/at/all"}, CheckpointError, "nowhere/at/all is not a folder"),
        ({"stage3__moe__moe_layers": [0, 9]}, ValueError, r"moe_layers names layer 9, but the language model has layers 0\.\.3"),
        ({"stage3__moe__moe_layers": "intervall"}, ValueError, "must be one of interval"),
    ],
)
def test_what_is_wrong_is_found_before_the_first_step(write_recipe, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        train(load_recipe(write_recipe(**settings)), [1, 2, 3], resume=False, console=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_stage_that_was_made_with_other_settings_is_not_taken_for_this_one(write_recipe):
    file = write_recipe()
    train(load_recipe(file), [1], resume=False, console=QUIET)
    with pytest.raises(RecipeError, match=r"stage1 was made with stage1.optimisation.max_steps 3, now 4: choose"):
        train(load_recipe(file, ["stage1.optimisation.max_steps=4"]), [1], resume=True, console=QUIET)
    train(load_recipe(file, ["stage2.optimisation.max_steps=4"]), [1], resume=True, console=QUIET)


def test_a_run_that_torchrun_restarts_resumes(write_recipe, stopping, monkeypatch, tmp_path):
    """It is known by torchrun's run id; "none" is no id."""
    recipe = load_recipe(write_recipe())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a/b")
    with stopping(2):
        train(recipe, [1], resume=False, console=QUIET)
    for other in ("c", "none"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", other)
        with pytest.raises(RecipeError, match="exists already, finished or not: continue with --resume"):
            train(recipe, [1], resume=False, console=QUIET)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a/b")
    train(recipe, [1], resume=False, console=QUIET)
    assert not list((tmp_path / "run").glob(".*"))
    with pytest.raises(RecipeError, match="exists already, finished or not: continue with --resume"):
        train(recipe, [1], resume=False, console=QUIET)


def test_a_batch_that_cannot_be_shared_out(write_recipe, monkeypatch):
    recipe = load_recipe(write_recipe())
    monkeypatch.setattr(TrainingArguments, "world_size", 3)
    with pytest.raises(RecipeError, match="batch_size is 4, but must be a multiple of what all 3 devices compute at once, 12"):
        train(recipe, [1], resume=False, console=QUIET)


def test_stage_one_needs_images(write_recipe, tmp_path):
    records = [{"conversations": [{"from": "human", "value": "is there a red 7 ?"}, {"from": "gpt", "value": "no"}]}]
    (tmp_path / "text.json").write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"record 0 of .*text.json has no image, but stage I trains the projector"):
        train(load_recipe(write_recipe(stage1__data__file=str(tmp_path / "text.json"))), [1], resume=False, console=QUIET)


def test_bf16_reaches_the_experts(write_recipe, put_stage, monkeypatch):
    from moe_llava.model.moe import GatedExperts

    seen = set()
    plain = GatedExperts.ffn

    def spy(self, x, linear):
        y = plain(self, x, linear)
        if torch.is_grad_enabled():  # upcycling compares the experts with their FFN, in the weights' type
            seen.add(y.dtype)
        return y

    file = write_recipe(precision="bf16")
    put_stage(2)
    monkeypatch.setattr(GatedExperts, "ffn", spy)
    train(load_recipe(file), [3], resume=False, console=QUIET)
    assert seen == {torch.bfloat16}


def test_stages_do_not_start_from_a_sparse_model(write_recipe, put_stage, tmp_path):
    recipe = load_recipe(write_recipe())
    put_stage(2)
    train(recipe, [3], resume=False, console=QUIET)
    recipe.model, recipe.output = str(tmp_path / "run" / "stage3"), str(tmp_path / "again")
    with pytest.raises(RecipeError, match="sparse already"):
        train(recipe, [1], resume=False, console=QUIET)


def test_stage_3_goes_on_from_a_sparse_model(write_recipe, put_stage, tmp_path):
    """With other settings where the weights allow it, and a word about it where they do not."""
    put_stage(2)
    train(load_recipe(write_recipe()), [3], resume=False, console=QUIET)
    before = load_file(tmp_path / "run" / "stage3" / "model.safetensors")
    again = {"model": str(tmp_path / "run" / "stage3"), "output": str(tmp_path / "again")}
    recipe = load_recipe(write_recipe(**again, stage3__moe={"num_experts_per_tok": 1, "capacity_factor": 1.5}))
    train(recipe, [3], resume=False, console=QUIET)
    config = load_config(tmp_path / "again" / "stage3")
    assert (config.num_experts, config.num_experts_per_tok, config.capacity_factor) == (4, 1, 1.5)
    after = load_file(tmp_path / "again" / "stage3" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".experts." in name or ".router." in name for name in changed)

    file = write_recipe(**{**again, "output": str(tmp_path / "alone")})
    raw = yaml.safe_load(file.read_text())
    del raw["stage1"], raw["stage2"]
    file.write_text(yaml.safe_dump(raw))
    assert list(load_recipe(file).stages) == [3]
    with pytest.raises(RecipeError, match="the recipe has no stage1"):
        train(load_recipe(file), [1], resume=False, console=QUIET)

    other = {**again, "output": str(tmp_path / "other")}
    for moe, message in (
        ({"num_experts": 8}, "has num_experts 4, but stage3.moe.num_experts says 8"),
        ({"moe_layers": "all"}, r"has moe_layers \[0, 2\], but stage3.moe.moe_layers says \[0, 1, 2, 3\]"),
        ({"use_residual": True}, "has use_residual False, but stage3.moe.use_residual says True"),
    ):
        with pytest.raises(RecipeError, match=message):
            train(load_recipe(write_recipe(**other, stage3__moe=moe)), [3], resume=False, console=QUIET)
    with pytest.raises(RecipeError, match=r"but stage3\.dense asks for the dense baseline"):
        train(load_recipe(write_recipe(**other, stage3__dense=True)), [3], resume=False, console=QUIET)
    assert not (tmp_path / "other").exists()


def test_a_stage_needs_the_one_before(write_recipe):
    with pytest.raises(CheckpointError, match=r"stage 2 starts from .*stage1, which does not exist: run stage 1 first"):
        train(load_recipe(write_recipe()), [2], resume=False, console=QUIET)
    with pytest.raises(CheckpointError, match=r"stage 3 starts from .*stage2, which does not exist"):
        train(load_recipe(write_recipe()), [1, 3], resume=False, console=QUIET)


def test_a_stage_on_several_files_in_another_form(write_recipe, tmp_path):
    """It says how many records there are: 24 pictures' captions, and half of them once more."""
    file = write_recipe()
    raw = yaml.safe_load(file.read_text())
    raw["stage1"]["data"] = [raw["stage1"]["data"], {**raw["stage1"]["data"], "weight": 0.5}]
    raw["stage1"]["template"] = "v1"
    raw["stage1"]["optimisation"]["max_steps"] = 1
    file.write_text(yaml.safe_dump(raw))
    number = len(json.loads(Path(raw["stage1"]["data"][0]["file"]).read_text()))
    console = Console(record=True, quiet=False, file=io.StringIO(), width=200)
    train(load_recipe(file), [1], resume=False, console=console)
    assert f"{number + round(number / 2)} records" in console.export_text()


def test_a_stage_of_before_a_setting_was_known(write_recipe, tmp_path):
    """What a recipe does not say is its default, in the folder of a finished stage too."""
    file = write_recipe()
    (stage1,) = train(load_recipe(file), [1], resume=False, console=QUIET)
    made = yaml.safe_load((stage1 / "recipe.yaml").read_text())
    del made["stage1"]["optimisation"]["packing"], made["torch_compile"]
    (stage1 / "recipe.yaml").write_text(yaml.safe_dump(made))
    assert train(load_recipe(file), [1], resume=True, console=QUIET) == [stage1]
    with pytest.raises(RecipeError, match=r"stage1 was made with stage1.optimisation.packing False, now True"):
        train(load_recipe(file, ["stage1.optimisation.packing=true"]), [1], resume=True, console=QUIET)


def test_all_that_is_wrong_with_the_data_of_all_stages_is_told_at_once(write_recipe, tmp_path):
    changes = {"stage1__max_length": 36, "stage2__data__file": "none.json", "stage3__data__weight": 0.0001}
    with pytest.raises(DataError) as caught:
        train(load_recipe(write_recipe(**changes)), [1, 2, 3], resume=False, console=QUIET)
    told = str(caught.value)
    assert "has images of 36 tokens, but stage1.max_length is 36" in told
    assert "data file none.json does not exist" in told
    assert "stage3.data has weight 0.0001 for" in told
