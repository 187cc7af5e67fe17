"""Tables against numbers worked out by hand."""

import dataclasses

import pytest

from moe_llava.experiments import ablate
from moe_llava.experiments.cells import CellBudget
from moe_llava.experiments.figures import plot_comparison
from moe_llava.experiments.plan import load_experiment, make_plan
from moe_llava.experiments.summary import all_scores, budget_table, by_cell, compare, planned_table, score_table
from moe_llava.experiments.trial import claim_part
from tests.experiments.conftest import QUIET

ACCURACY = {"dense": [0.50, 0.60, 0.70], "sparse": [0.51, 0.62, 0.73], "worse": [0.40, 0.50, 0.60]}


@pytest.fixture
def plan(setup, write_experiment):
    cells = {"dense": {"set": ["stage3.dense=true"]}, "sparse": None, "worse": {"against": "sparse"}}
    return make_plan(load_experiment(write_experiment(cells=cells)), setup)


def results(tokens=100, flops=10**12):
    return [
        {
            "cell": cell, "seed": seed, "steps": [2, 3], "tokens": [50, tokens if cell == "sparse" else 100],
            "flops": flops if cell == "sparse" else 10**12, "parameters": {"active": 7, "total": 9}, "seconds": [1.0, 2.0],
            "scores": {"accuracy": value},
        }
        for cell, values in ACCURACY.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip


def cells_of(table):
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()[2:]}


def test_scores_and_pairs(plan):
    """Sparse minus dense: 0.01, 0.02, 0.03, mean 0.02, SD 0.01, t = 0.02 / (0.01 / sqrt 3) = 3.464 with 2 degrees of freedom."""
    found = by_cell(plan, results(), "scores", "accuracy")
    assert found == ACCURACY
    dense, sparse, worse = compare(plan, found)
    assert dense.difference is None
    assert (dense.mean.mean, dense.sd) == (pytest.approx(0.6), pytest.approx(0.1))
    assert dense.mean.high == pytest.approx(0.6 + 4.30265 * 0.1 / 3**0.5, abs=1e-5)
    assert sparse.difference.mean == pytest.approx(0.02)
    assert sparse.difference.low == pytest.approx(0.02 - 4.30265 * 0.01 / 3**0.5, abs=1e-6)
    # Student's distribution with two degrees of freedom in closed form: p = 1 - t / sqrt(2 + t^2)
    assert sparse.p == pytest.approx(1 - 3.4641016 / (2 + 12) ** 0.5)
    assert worse.difference.mean == pytest.approx(-0.12)  # against sparse, not dense
    assert worse.p_holm == pytest.approx(2 * worse.p)
    assert sparse.p_holm == pytest.approx(sparse.p)
    rows = cells_of(score_table("accuracy", [dense, sparse, worse]))
    assert rows["dense"] == ["0.6", "0.1", "0.352 to 0.848", "", "", "", "", ""]
    assert rows["sparse"] == ["0.62", "0.11", "0.347 to 0.893", "+0.02", "-0.00484 to 0.0448", "dense", "0.074", "0.074"]
    assert rows["worse"][5] == "sparse"
    assert cells_of(all_scores(plan, results()))["accuracy"] == ["0.6 (0.1)", "0.62 (0.11)", "0.5 (0.1)"]


@pytest.mark.parametrize("dropped", [("dense", 0), ("sparse", 2)])
def test_scores_that_some_results_leave_out(plan, dropped):
    """The lenient score is left out where it equals the other one; precision where it is undefined."""
    found = results()
    for result in found:
        kept = (result["cell"], result["seed"]) != dropped
        result["scores"] |= {"yes/precision": 50.0, "accuracy (lenient)": result["scores"]["accuracy"]} if kept else {}
        result["scores"] |= {"precision": 50.0} if kept else {}
    rows = cells_of(all_scores(plan, found))
    assert rows["accuracy (lenient)"] == rows["accuracy"] == ["0.6 (0.1)", "0.62 (0.11)", "0.5 (0.1)"]
    expected = ["undefined in 1 of 3" if cell == dropped[0] else "50 (0)" for cell in ACCURACY]
    assert rows["yes/precision"] == expected
    plan.out.mkdir()
    rows = cells_of(claim_part(plan, found))
    assert rows["accuracy (lenient)"] == rows["accuracy"] == ["0.6", "0.62", "+0.02", "-0.00484 to +0.0448"]
    assert rows["precision"] == [*("undefined in 1 of 3" if cell == dropped[0] else "50" for cell in ("dense", "sparse")), "", ""]
    assert "yes/precision" not in rows
    assert (plan.out / "scores.png").is_file()


def test_an_ablation_states_that_a_main_score_is_undefined(setup, plan, monkeypatch):
    plan.out.mkdir()
    plan = dataclasses.replace(plan, benchmark=dataclasses.replace(plan.benchmark, headline=("accuracy", "cognition")))
    found = [result | {"training": {"language_loss": 1.0, "largest_load": None}} for result in results()]
    monkeypatch.setattr(ablate, "conduct", lambda *_: (plan, found))
    text = ablate.run_ablation("topk", setup, QUIET).read_text()
    assert "| sparse | 0.62 | 0.11 |" in text
    assert "cognition: undefined in 9 of 9 runs" in text


def test_unequal_budgets_are_flagged(plan):
    rows = cells_of(budget_table(plan, results()))
    assert rows["sparse"] == ["5", "150", "7", "9", "1", "3", "yes"]
    assert rows["dense"][-1] == ""
    assert cells_of(budget_table(plan, results(tokens=120)))["sparse"][-1] == "**no: tokens**"
    assert cells_of(budget_table(plan, results(flops=11 * 10**11)))["sparse"][-1] == "**no: FLOPs**"
    assert cells_of(budget_table(plan, results(flops=1_005 * 10**9)))["sparse"][-1] == "yes"
    assert cells_of(budget_table(plan, results(tokens=120)))["worse"][-1] == "**no: tokens**"


def test_budgets_before_the_first_run(plan):
    budgets = {
        "dense": CellBudget([2, 3], [10, 20], 5, 5),
        "sparse": CellBudget([2, 4], [10, 20], 5, 9),
        "worse": CellBudget([6], [30], 5, 9),
    }
    head, dense, sparse, worse = planned_table(plan, budgets)
    assert head[-1] == "equal"
    assert dense == ["dense", "2 + 3", "5", "5", "0.00 + 0.00", ""]
    assert sparse[-1] == "**no: steps, FLOPs**"
    assert worse[-1] == "**no: FLOPs**"  # six steps are six steps, however they are divided
    assert planned_table(plan, budgets | {"sparse": CellBudget([-1, -1], [10, 20], 5, 9)})[2][-1] == "known after the runs"


def test_picture(plan):
    figure = plot_comparison(compare(plan, ACCURACY), "accuracy", plan.experiment.baseline, margin=0.05)
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["dense", "sparse", "worse"]
    assert {round(line.get_xdata()[0], 6) for line in right.lines if len(line.get_xdata()) == 1} == {0.02, -0.12}
    assert any(list(line.get_xdata()) == [-0.05, -0.05] for line in right.lines)
