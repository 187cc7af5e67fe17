"""Experiments of a few seconds: the tiny base, stages of two steps, four test pictures."""

import pytest
import yaml
from rich.console import Console

from moe_llava.experiments import plan
from tests.training.conftest import tiny_base, write_recipe  # noqa: F401

QUIET = Console(quiet=True)


@pytest.fixture
def setup(tiny_base, write_recipe, tmp_path):  # noqa: F811
    steps = {f"stage{number}__optimisation__max_steps": 2 for number in (1, 2, 3)}
    return plan.Setup(tmp_path / "out", write_recipe(**steps), [], 2, "digits", tiny_base / "data")


@pytest.fixture
def write_experiment(tmp_path):
    """Writes experiment.yaml: a dense baseline and a sparse cell, unless told otherwise."""

    def write(**changes):
        raw = {"title": "Small", "paper": "Nothing.", "baseline": "dense", "claim": "sparse"}
        raw["cells"] = {"dense": {"set": ["stage3.dense=true"]}, "sparse": None}
        file = tmp_path / "experiment.yaml"
        file.write_text(yaml.safe_dump(raw | changes))
        return file

    return write
