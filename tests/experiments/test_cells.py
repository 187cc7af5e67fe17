"""Cells on a tiny model: what they share, how they resume, and every strategy."""

import dataclasses
import shutil

import pytest
import torch
import yaml
from filelock import FileLock
from transformers import AutoModelForImageTextToText, LlavaConfig

from moe_llava import MoeLlavaForConditionalGeneration
from moe_llava.checkpoints.load import load_checkpoint
from moe_llava.common.files import read_lines
from moe_llava.experiments import running
from moe_llava.experiments.ablate import run_ablation
from moe_llava.experiments.cells import ExperimentError, cut_layers
from moe_llava.experiments.plan import load_experiment, make_plan, write_plan
from moe_llava.experiments.running import run_cells
from moe_llava.training import run
from tests.experiments.conftest import QUIET
from tests.vlm import FAMILIES, TEXT, random_vlm


def of_training(results):
    """Without times, and without what only a trial measures."""
    return [
        {key: value for key, value in each.items() if key not in ("seconds", "unperturbed", "perturbed", "calibration")} for each in results
    ]


def log(folder):
    return [line for line in read_lines(folder / "log.jsonl") if "loss" in line]


def first_loss(folder):
    return log(folder)[0].get("language_loss", log(folder)[0]["loss"])


def test_an_ablation_writes_a_table(finished, write_experiment, tmp_path):
    """The cells are those that a trial has trained."""
    setup = dataclasses.replace(finished[0], out=tmp_path / "out")
    shutil.copytree(finished[0].out, setup.out, symlinks=True)
    (setup.out / "plan.json").unlink()
    table = run_ablation(str(write_experiment()), setup, QUIET)
    results = read_lines(setup.out / "results.jsonl")
    assert [(result["cell"], result["seed"]) for result in results] == [("dense", 0), ("dense", 1), ("sparse", 0), ("sparse", 1)]
    text = table.read_text()
    assert "# Small" in text
    assert "**no: FLOPs**" in text
    assert "Under perturbation" not in text
    assert (setup.out / "scores.png").stat().st_size > 10_000

    # Cells of a seed share stages, batches and what they begin with: the first loss is the same, sparse or dense.
    assert len(list((setup.out / "shared").glob("*/stage*"))) == 4
    folders = {(cell, seed): setup.out / "cells" / cell / f"seed-{seed}" for cell in ("dense", "sparse") for seed in (0, 1)}
    for seed in (0, 1):
        assert first_loss(folders["dense", seed] / "dense") == pytest.approx(first_loss(folders["sparse", seed] / "stage3"), abs=2e-4)
    assert first_loss(folders["dense", 0] / "dense") != first_loss(folders["dense", 1] / "dense")
    for result in results:
        assert result["steps"] == [2, 2, 2]
        folder = folders[result["cell"], result["seed"]]
        assert result["tokens"][2] == log(folder / ("dense" if result["cell"] == "dense" else "stage3"))[-1]["tokens"]
    assert results[0]["tokens"] == results[2]["tokens"] != results[1]["tokens"]


def test_an_ablation_under_perturbation(finished, write_experiment, tmp_path):
    """The cells are those that a trial has trained and evaluated."""
    setup = dataclasses.replace(finished[0], out=tmp_path / "out")
    shutil.copytree(finished[0].out, setup.out, symlinks=True)
    (setup.out / "plan.json").unlink()
    text = run_ablation(str(write_experiment(perturb="noise:3,order:2")), setup, QUIET).read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| cell | as they are |"))
    assert line == "| cell | as they are | noise:3 | order:2 |"
    assert (setup.out / "perturbed.png").stat().st_size > 10_000
    for result in read_lines(setup.out / "results.jsonl"):
        assert result["unperturbed"] == pytest.approx(result["scores"]["accuracy"])


def test_a_stopped_run_resumes(finished, write_experiment, tmp_path, monkeypatch):
    """Stopped in two places, the cells of a seed end as those of a run that was not."""

    class Killed(BaseException):
        pass

    plan = make_plan(load_experiment(write_experiment()), dataclasses.replace(finished[0], out=tmp_path / "again", seeds=1))
    write_plan(plan)
    for most_steps, done in ((3, 0), (4, 1)):  # in stage II, and in the second cell's stage III
        left = iter(range(most_steps))

        def stop(self, args, state, control, left=left, **kwargs):
            if next(left, None) is None:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(run.ProgressDisplay, "on_step_end", stop)
            with pytest.raises(Killed):
                run_cells(plan, QUIET)
        assert len(list(plan.out.glob("cells/*/*/cell.json"))) == done
    first = plan.cells["dense"].result
    before = first.stat().st_mtime_ns
    results = run_cells(plan, QUIET)
    assert first.stat().st_mtime_ns == before
    whole = [result for result in read_lines(finished[0].out / "results.jsonl") if result["seed"] == 0]
    assert of_training(results) == of_training(read_lines(plan.out / "results.jsonl")) == of_training(whole)


def test_every_way_to_train(setup, write_experiment, tiny_base):
    cells = {
        "dense_merged": {"strategy": "merged", "set": ["stage3.dense=true", "stage3.tuned=all"]},
        "sparse_twice": {"strategy": "sparse_twice", "set": ["stage3.tuned=all"]},
        "evolution": {"evolve": True},
        "short": {"layers": 2},
    }
    experiment = load_experiment(write_experiment(cells=cells, baseline="evolution", claim=None))
    plan = make_plan(experiment, dataclasses.replace(setup, seeds=1))
    results = {result["cell"]: result for result in run_cells(plan, QUIET)}
    assert {name: result["steps"] for name, result in results.items()} == {
        "dense_merged": [2, 4], "sparse_twice": [2, 2, 2], "evolution": [2, 2, 2], "short": [2, 2, 2],
    }  # fmt: skip
    stages = {folder.name.split("-")[0] for folder in (plan.out / "shared" / "seed-0").iterdir()}
    assert stages == {"stage1", "stage2"}
    assert len(list((plan.out / "shared" / "seed-0").iterdir())) == 4  # of four layers and of two

    def model(name):
        return AutoModelForImageTextToText.from_pretrained(plan.out / results[name]["checkpoint"])

    twice, short = model("sparse_twice"), model("short")
    assert isinstance(twice, MoeLlavaForConditionalGeneration)
    assert not isinstance(model("dense_merged"), MoeLlavaForConditionalGeneration)
    assert short.config.text_config.num_hidden_layers == 2
    assert results["short"]["parameters"]["total"] < results["evolution"]["parameters"]["total"]
    evolved = AutoModelForImageTextToText.from_pretrained(plan.cells["evolution"].folder / "evolved")
    experts = next(iter(evolved.sparse_mlps().values())).experts
    assert not any(torch.equal(parameter[0], parameter[1]) for parameter in experts.parameters())

    # The first sparse stage of two, and the merged one, start from stage I on the same data: the same first loss.
    first = plan.cells["sparse_twice"].folder / "first1" / "stage3"
    merged = plan.out / results["dense_merged"]["checkpoint"]
    assert first_loss(first) == pytest.approx(first_loss(merged), abs=2e-4)


def base_with(text, tiny_base, folder):
    """Save the tiny base with another language model, of four layers; return its folder."""
    shutil.copytree(tiny_base / "base", folder)
    settings = LlavaConfig.from_pretrained(folder).to_dict()
    size = {"vocab_size": settings["text_config"]["vocab_size"]}
    random_vlm(LlavaConfig.from_dict(settings | {"text_config": TEXT | text | size})).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "text", [{"model_type": "llama"}, {"model_type": "qwen2"}, FAMILIES["gemma3"].text | {"model_type": "gemma3_text"}]
)
def test_first_layers_of_a_language_model(tiny_base, tmp_path, text):
    whole, cut = base_with(text, tiny_base, tmp_path / "whole"), tmp_path / "models" / "layers-3"
    cut_layers(str(whole), 3, cut)
    model, processor = load_checkpoint(whole)
    del model.model.language_model.layers[3:]
    inputs = processor.tokenizer("how many digits are there ?", return_tensors="pt")
    assert torch.equal(load_checkpoint(cut)[0](**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)
    with pytest.raises(ExperimentError, match=r"whole has 4 layers, but the experiment needs the first 5"):
        cut_layers(str(whole), 5, tmp_path / "models" / "layers-5")


def test_a_model_that_cannot_be_cut_leaves_no_folder(tiny_base, tmp_path):
    """The layers that are left share the keys and values of those that are not."""
    whole = base_with(FAMILIES["gemma4"].text | {"model_type": "gemma4_text"}, tiny_base, tmp_path / "whole")
    with pytest.raises(ExperimentError, match=r"whole cannot be cut to its first 2 layers: "):
        cut_layers(str(whole), 2, tmp_path / "models" / "layers-2")
    assert [each.name for each in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("missing", [("stage1", "stage2"), ("stage2",)], ids=" and ".join)
def test_a_stage_starts_from_the_one_before_in_the_recipe(setup, write_experiment, missing):
    """Or from the model, if it is the first."""
    raw = yaml.safe_load(setup.recipe.read_text())
    for name in missing:
        del raw[name]
    setup.recipe.write_text(yaml.safe_dump(raw))
    experiment = load_experiment(write_experiment(cells={"sparse": None}, baseline="sparse"))
    plan = make_plan(experiment, dataclasses.replace(setup, seeds=1))
    assert [result["steps"] for result in run_cells(plan, QUIET)] == [[2] * (3 - len(missing))]
    assert (plan.out / "shared").exists() == ("stage1" not in missing)
    assert (plan.cells["sparse"].folder / "stage1").is_symlink() == ("stage1" not in missing)


def test_refusals(setup, write_experiment, monkeypatch):
    experiment = load_experiment(write_experiment(cells={"dense": {"layers": 9}, "sparse": None}))
    with pytest.raises(ExperimentError, match="has 4 layers, but the experiment needs the first 9"):
        run_cells(make_plan(experiment, setup), QUIET)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ExperimentError, match="in one process"):
        run_cells(make_plan(experiment, setup), QUIET)


def test_two_processes_share_the_seeds(setup, write_experiment, monkeypatch):
    """One holds seed 0 for as long as this process has other work; in the end the results of all cells are there."""
    plan = make_plan(load_experiment(write_experiment()), setup)
    plan.out.mkdir()
    held, order = FileLock(plan.out / "seed-0.lock"), []
    held.acquire()
    alone = running.run_seed

    def run_cell(cell, plan, console):
        cell.folder.mkdir(parents=True)
        return {"cell": cell.name, "seed": cell.recipe.seed}

    def noted(plan, seed, console):
        order.append(seed)
        alone(plan, seed, console)
        held.release()

    monkeypatch.setattr(running, "run_seed", noted)
    monkeypatch.setattr(running, "run_cell", run_cell)
    results = run_cells(plan, QUIET)
    assert order == [1, 0, 1]
    assert [(result["cell"], result["seed"]) for result in results] == [("dense", 0), ("dense", 1), ("sparse", 0), ("sparse", 1)]
