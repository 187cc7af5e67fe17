"""A stage that is killed at any of its file operations and resumed ends with the same bits, statistics and logs."""

import pytest

from tests.conftest import in_fresh_process
from tests.training import killed

ADAPTER = {"targets": ["attention", "experts", "routers"], "rank": 2}
SMOES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_layers": "interval", "routing": "smoes"}
STAGES = {
    "stage1": (1, {}),
    "stage2": (2, {"stage2__optimisation__group_by_length": True}),
    "stage2-adapter": (2, {"stage2__adapter": {"targets": ["attention"], "rank": 2, "dropout": 0.5}}),
    "stage3-smoes": (3, {"stage3__moe": SMOES}),
    "stage3-adapter": (3, {"stage3__adapter": ADAPTER}),
    "dense": (3, {"stage3__dense": True}),
}


def kill(write_recipe, put_stage, tmp_path, kind, numbers):
    """24 records in batches of 4, so 3 steps end within an epoch: Trainer would go on after the last save."""
    stage, settings = STAGES[kind]
    file = write_recipe(logging_steps=100, **settings)
    (tmp_path / "before").mkdir()
    put_stage(stage - 1, tmp_path / "before")
    in_fresh_process(killed.main, file, stage, tmp_path, *numbers)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "numbers"), [("stage3-smoes", (-1, -4, -6, -12)), ("stage3-adapter", (20, -3))])
def test_a_stage_that_was_killed_at_some_of_its_file_operations(write_recipe, put_stage, tmp_path, kind, numbers):
    kill(write_recipe, put_stage, tmp_path, kind, numbers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stage1", "stage2", "stage3-smoes", "dense"])
def test_a_stage_that_was_killed_at_its_last_file_operations(write_recipe, put_stage, tmp_path, kind):
    """The last save, the finished stage, its name, and what is removed then. All operations take minutes: see killed.py."""
    kill(write_recipe, put_stage, tmp_path, kind, range(-24, 0))
