"""Ablations and trials of a finished model of another family, on the digits world: a recipe with stage III alone keeps its model."""

import json

import pytest
import yaml

from moe_llava.training.recipe import load_recipe
from tests.conftest import run_here
from tests.families.processors import tiny_checkpoint


@pytest.mark.slow
def test_an_ablation_of_an_aligned_model(tmp_path):
    model = tiny_checkpoint("qwen3_vl", tmp_path / "model")
    optimisation = {"learning_rate": 1e-3, "batch_size": 4, "per_device_batch_size": 4, "max_steps": 2}
    recipe = {"model": str(model), "output": "runs", "stage3": {"data": {"file": "x", "images": "x"}, "optimisation": optimisation}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cells = {"dense": {"set": ["stage3.dense=true"]}, "sparse": {}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"title": "Two", "paper": "None.", "baseline": "dense", "cells": cells}))
    sizes = ("--seeds", "2", "--train-images", "4", "--test-images", "1")
    done = run_here("ablate", tmp_path / "two.yaml", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "out", *sizes)
    assert done.exit_code == 0, done.output
    for cell in cells:
        for seed in (0, 1):
            folder = tmp_path / "out" / "cells" / cell / f"seed-{seed}"
            assert json.loads((folder / "cell.json").read_text())
            assert load_recipe(next(folder.glob("*/recipe.yaml"))).model == str(model)
    assert "sparse" in (tmp_path / "out" / "table.md").read_text()
