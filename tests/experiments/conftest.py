"""Experiments of a few seconds: the tiny base, stages of two steps, four test pictures."""

import gc

import pytest
import yaml
from matplotlib.figure import Figure
from rich.console import Console

from moe_llava.digits import RECIPE
from moe_llava.experiments import plan
from moe_llava.experiments.trial import run_trial
from moe_llava.training import run
from tests.training.conftest import tiny_base, write_recipe  # noqa: F401

QUIET = Console(quiet=True)
gc.freeze()  # every training collects garbage: not among the imported modules


@pytest.fixture(autouse=True)
def empty_pictures_of_stages(monkeypatch):
    """Drawing the losses takes longer than these stages do; the tests of training look at the picture."""
    monkeypatch.setattr(run, "plot_run", lambda entries: Figure(figsize=(1, 1)))


@pytest.fixture
def setup(tiny_base, write_recipe, tmp_path):  # noqa: F811
    steps = {f"stage{number}__optimisation__max_steps": 2 for number in (1, 2, 3)}
    return plan.Setup(tmp_path / "out", write_recipe(**steps), [], 2, "digits", tiny_base / "data")


def experiment_file(folder, **changes):
    """Write experiment.yaml: a dense baseline and a sparse cell, unless changed."""
    raw = {"title": "Small", "paper": "Nothing.", "baseline": "dense", "claim": "sparse"}
    raw["cells"] = {"dense": {"set": ["stage3.dense=true"]}, "sparse": None}
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(raw | changes))
    return file


@pytest.fixture
def write_experiment(tmp_path):
    return lambda **changes: experiment_file(tmp_path, **changes)


@pytest.fixture(scope="session")
def finished(tiny_base, tmp_path_factory):  # noqa: F811
    """A complete trial of two cells with two seeds: (setup, experiment file, report). Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    settings = [f"model={tiny_base / 'base'}", "precision=fp32", "logging_steps=1", "save_steps=2"]
    for stage, data in (("stage1", "captions"), ("stage2", "train"), ("stage3", "train")):
        settings += [f"{stage}.data.file={tiny_base / 'data' / data}.json", f"{stage}.data.images={tiny_base / 'data' / 'images'}"]
        sizes = {"batch_size": 4, "per_device_batch_size": 4, "max_steps": 2}
        settings += [f"{stage}.optimisation.{key}={value}" for key, value in sizes.items()]
    setup = plan.Setup(folder / "out", RECIPE, settings, 2, "digits", tiny_base / "data")
    file = experiment_file(folder, perturb="noise:3,order:2", calibrate=True)
    return setup, file, run_trial(setup, 0.5, QUIET, file)
