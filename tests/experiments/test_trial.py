"""The verdict, and the trial from plan to report."""

import dataclasses
import json

import numpy as np
import pytest

from moe_llava.common.files import read_lines
from moe_llava.evaluation.score.statistics import Interval
from moe_llava.experiments.cells import ExperimentError
from moe_llava.experiments.plan import load_experiment, make_plan
from moe_llava.experiments.trial import judge, run_trial, verdict
from tests.conftest import run_here
from tests.experiments.conftest import QUIET
from tests.training.conftest import tiny_base  # noqa: F401


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.01, 0.05, "superior"),
        (-0.01, 0.05, "non-inferior"),
        (-0.015, -0.005, "non-inferior"),  # worse, but not by the margin
        (-0.03, 0.05, "undecided"),
        (-0.03, -0.01, "undecided"),
        (-0.02, 0.01, "undecided"),  # just at the margin is not above it
        (-0.05, -0.03, "inferior"),
    ],
)
def test_verdicts(low, high, expected):
    assert verdict(Interval((low + high) / 2, low, high, 100), margin=0.02) == expected


@pytest.mark.parametrize(("shift", "expected"), [(0.3, "superior"), (0.0, "non-inferior"), (-0.2, "undecided"), (-0.4, "inferior")])
def test_judging_answers(setup, write_experiment, shift, expected):
    """Sparse changes a known share of the answers to 300 pictures with a question each, in five seeds."""

    plan = make_plan(load_experiment(write_experiment()), setup, 0.1)
    random = np.random.default_rng(0)
    dense_SN = (random.random((5, 300)) < 0.5).astype(float)
    changed_SN = random.random((5, 300)) < abs(shift)
    sparse_SN = np.where(changed_SN, float(shift > 0), dense_SN)
    units = [str(number) for number in range(300)]
    (judged,) = judge(plan, {"dense": (dense_SN, units), "sparse": (sparse_SN, units)})
    assert (judged.cell, judged.verdict) == ("sparse", expected)
    assert judged.difference.mean == pytest.approx((sparse_SN - dense_SN).mean())


def test_a_trial_from_plan_to_report(finished):
    setup, file, report = finished
    text = report.read_text()
    results = read_lines(setup.out / "results.jsonl")
    shares = {cell: [result["scores"]["accuracy"] for result in results if result["cell"] == cell] for cell in ("dense", "sparse")}
    difference = np.mean(shares["sparse"]) - np.mean(shares["dense"])
    assert f"sparse minus dense: {difference + 0.0:+.3g} of all questions" in text
    for part in (
        "margin 0.5",
        "existence/adversarial/f1",
        "calibration error",
        "noise:3",
        "order:2",
        "**no: FLOPs**",
        "--margin 0.5 --seeds 2",
    ):
        assert part in text, part
    for result in results:
        assert set(result["perturbed"]) == {"noise:3", "order:2"}
        assert result["calibration"]["n"] == sum(each["n"] for each in result["calibration"]["bins"])
        assert 0 <= result["calibration"]["brier"] <= 1
    for picture in ("verdict", "scores", "calibration", "perturbed"):
        assert f"({picture}.png)" in text
        assert (setup.out / f"{picture}.png").stat().st_size > 10_000
    assert json.loads((setup.out / "plan.json").read_text())["margin"] == 0.5
    with pytest.raises(ExperimentError, match=r"margin 0.5, now 0.6"):
        run_trial(setup, 0.6, QUIET, file)
    assert run_trial(setup, 0.5, QUIET, file).read_text() == text


@pytest.mark.parametrize(
    ("key", "message"),
    [("family", "no questions whose known answer is yes or no"), ("image", "are about one picture: a verdict about other")],
)
def test_questions_of_own_data_that_cannot_be_judged(setup, write_experiment, tiny_base, tmp_path, key, message):  # noqa: F811
    records = json.loads((tiny_base / "data" / "test.json").read_text())
    only = next(record for record in records if record["family"] == "count")
    (tmp_path / "test.json").write_text(json.dumps([record for record in records if record[key] == only[key]]))
    (tmp_path / "images").symlink_to(tiny_base / "data" / "images")
    with pytest.raises(ExperimentError, match=message):
        run_trial(dataclasses.replace(setup, data=tmp_path), 0.5, QUIET, write_experiment(calibrate=True))
    assert not (setup.out / "plan.json").exists()


def test_the_command_refuses_before_it_begins(tmp_path):
    for arguments, message in (
        (["trial", "--out", tmp_path / "a"], "Missing option '--margin'"),
        (["trial", "--margin", "0.02", "--seeds", "4", "--out", tmp_path / "a"], "Invalid value for '--seeds'"),
        (["ablate", "capacitty", "--out", tmp_path / "a"], "did you mean capacity? There are"),
    ):
        done = run_here(*arguments)
        assert done.exit_code == 2
        assert message in done.stderr, done.stderr
    assert not (tmp_path / "a").exists()


def test_nothing_is_written_before_the_options_are_checked(setup, write_experiment):
    digits_world = dataclasses.replace(setup, data=None)
    with pytest.raises(ExperimentError, match="the margin is 0"):
        run_trial(digits_world, 0.0, QUIET, write_experiment())
    with pytest.raises(ExperimentError, match="--test-images must be at least 2"):
        run_trial(dataclasses.replace(digits_world, images=(None, 1)), 0.1, QUIET, write_experiment())
    with pytest.raises(ExperimentError, match="cell sparse: "):
        run_trial(digits_world, 0.1, QUIET, write_experiment(cells={"dense": None, "sparse": {"set": ["stage3.moe.num_experts=x"]}}))
    assert not setup.out.exists()
