"""Test the paper's claim: a sparse model is no worse than the dense one trained from the same checkpoint, data, order and steps.

The measure is accuracy over all questions, sparse minus dense, mean over the seeds. The margin by which sparse may be worse is stated
before the first run. The 95% interval covers other seeds and other questions (`crossed_interval`); each of its ends is a one-sided test at
2.5%, as is usual for non-inferiority.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jinja2 import Environment, StrictUndefined
from rich.console import Console

import moe_llava
from moe_llava.common.files import write_whole
from moe_llava.digits import RECIPE
from moe_llava.evaluation.ask.answers import read_answers
from moe_llava.evaluation.score.benchmark import LENIENT
from moe_llava.evaluation.score.statistics import Interval, crossed_interval
from moe_llava.experiments.ablate import conditions, conduct, perturbed_part, save
from moe_llava.experiments.figures import plot_calibration, plot_comparison, plot_differences
from moe_llava.experiments.plan import TRIAL, Plan, Setup, load_experiment
from moe_llava.experiments.summary import (
    Row,
    all_scores,
    budget_table,
    by_cell,
    compare,
    markdown,
    score_names,
    score_table,
    scores_by_cell,
    signed,
    undefined,
)

# The score, 0 to 1, of each seed's answer to each question [S, N]; and the unit of each question, such as its picture.
Answers = tuple[np.ndarray, list[str]]

MEANING = {
    "superior": "better; the whole interval lies above 0",
    "non-inferior": "not worse by as much as the margin; the whole interval lies above minus the margin",
    "inferior": "worse by more than the margin; the whole interval lies below minus the margin",
    "undecided": "minus the margin lies within the interval: too few seeds or questions to decide",
}
INTERVAL = "95% interval for other seeds and questions"
PARTS_OF_F1 = ("/precision", "/recall", "/yes_share")


@dataclass(frozen=True)
class Judged:
    """A cell compared with the baseline. `difference`: its interval covers other seeds and other questions."""

    cell: str
    difference: Interval
    verdict: str


def verdict(difference: Interval, margin: float) -> str:
    """Return a key of MEANING."""
    if difference.low > 0:
        return "superior"
    if difference.low > -margin:
        return "non-inferior"
    return "inferior" if difference.high < -margin else "undecided"


def run_trial(setup: Setup, margin: float, console: Console, file: Path = TRIAL) -> Path:
    """Run the experiment in `file`; write report.md, with pictures and results.jsonl beside it, and return its path.

    Raise what `make_plan`, `train` and `evaluate` raise.
    """
    plan, results = conduct(load_experiment(file), setup, margin, console)
    answers = {cell: right_answers(plan, cell) for cell in plan.cells}
    judged = judge(plan, answers)
    rows = compare(plan, {cell: right_SN.mean(axis=1).tolist() for cell, (right_SN, _) in answers.items()})
    differences = {each.cell: each.difference for each in judged}
    drawn = [replace(row, difference=differences.get(row.cell)) for row in rows]
    save(plot_comparison(drawn, "accuracy", plan.experiment.baseline, margin, INTERVAL), plan.out / "verdict.png")
    return write_page(
        "trial.md.jinja",
        plan,
        results,
        judged,
        rows,
        calibration=calibration_part(plan, results),
        perturbed=perturbed_part(plan, results, rows),
        command=command(setup, margin),
    )


def write_page(template: str, plan: Plan, results: list[dict[str, Any]], judged: list[Judged], rows: list[Row], **own: Any) -> Path:
    """Write report.md from a template of this folder, with what all trials report and the template's `own` values; return its path."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    report = environment.from_string((Path(__file__).parent / template).read_text(encoding="utf-8")).render(
        plan=plan,
        claim=next(each for each in judged if each.cell == plan.experiment.claim),
        meaning=MEANING,
        conditions=conditions(plan),
        verdicts=verdict_table(judged, rows),
        shares=score_table("accuracy", rows),
        budgets=budget_table(plan, results),
        by_score=claim_part(plan, results),
        scores=all_scores(plan, results),
        signed=signed,
        versions={module.__name__: module.__version__ for module in (moe_llava, torch, transformers)},
        **own,
    )
    write_whole(plan.out / "report.md", report.strip() + "\n")
    return plan.out / "report.md"


def judge(plan: Plan, answers: Mapping[str, Answers]) -> list[Judged]:
    """Compare every other cell with the baseline."""
    assert plan.margin is not None
    dense_SN, units = answers[plan.experiment.baseline]
    found = []
    for cell, (right_SN, _) in answers.items():
        if cell != plan.experiment.baseline:
            difference = crossed_interval(right_SN - dense_SN, units)
            found.append(Judged(cell, difference, verdict(difference, plan.margin)))
    return found


def right_answers(plan: Plan, cell: str) -> Answers:
    """Score the answers of a cell with every seed."""
    questions, score = plan.benchmark.questions(plan.data), plan.benchmark.score
    assert score is not None
    folders = [plan.cells[cell].with_seed(seed).folder / "answers" / plan.benchmark.name for seed in plan.seeds]
    scored = [score(plan.data, questions, read_answers(folder, questions)) for folder in folders]
    return np.array([[float(item["right"]) for item in each.items] for each in scored]), scored[0].units


def verdict_table(judged: Sequence[Judged], rows: Sequence[Row]) -> str:
    over_seeds = {row.cell: row.difference for row in rows}
    lines = [["cell", "difference", "95%, other seeds and questions", "95%, other seeds", "verdict"]]
    for each in judged:
        seeds = over_seeds[each.cell]
        assert seeds is not None
        both, alone = (f"{signed(interval.low)} to {signed(interval.high)}" for interval in (each.difference, seeds))
        lines.append([each.cell, signed(each.difference.mean), both, alone, each.verdict])
    return markdown(lines)


def calibration_part(plan: Plan, results: Sequence[dict[str, Any]]) -> str:
    """Return the tables of calibration, and draw its picture."""
    if not plan.experiment.calibrate:
        return ""
    assert plan.experiment.claim is not None
    save(plot_calibration(results, [plan.experiment.baseline, plan.experiment.claim]), plan.out / "calibration.png")
    tables = [
        score_table(title, compare(plan, by_cell(plan, results, "calibration", key)))
        for key, title in (("error", "calibration error"), ("brier", "Brier score"))
    ]
    return "\n".join(tables)


def claim_part(plan: Plan, results: Sequence[dict[str, Any]]) -> str:
    """Return the table that compares the claim with the baseline, score by score, and draw its picture. F1 stands for its parts."""
    baseline, claim = plan.experiment.baseline, plan.experiment.claim
    assert claim is not None
    lines, differences = [["score", baseline, claim, "difference", "95% interval over seeds"]], {}
    for score in (name for name in score_names(results) if not name.removesuffix(LENIENT).endswith(PARTS_OF_F1)):
        rows = {row.cell: row for row in compare(plan, scores_by_cell(plan, results, score))}
        found = rows[claim].difference
        assert found is not None
        means = [undefined(rows[name].values) or f"{rows[name].mean.mean:.4g}" for name in (baseline, claim)]
        if undefined([found.mean]):
            lines.append([score, *means, "", ""])
            continue
        lines.append([score, *means, signed(found.mean), f"{signed(found.low)} to {signed(found.high)}"])
        differences[score] = found
    save(plot_differences(differences, f"{claim} minus {baseline}"), plan.out / "scores.png")
    return markdown(lines)


def command(setup: Setup, margin: float, options: Sequence[str] = ()) -> str:
    """Return the command that repeats the trial, with further `options`."""
    words = ["moe-llava", "trial", *options, "--margin", f"{margin:g}", "--seeds", str(setup.seeds), "--out", str(setup.out)]
    words += [] if setup.recipe == RECIPE else ["--recipe", str(setup.recipe)]
    words += [word for setting in setup.settings for word in ("--set", setting)]
    if setup.data is not None:
        words += ["--benchmark", setup.benchmark, "--data", str(setup.data)]
    for name, number in zip(("--train-images", "--test-images"), setup.images, strict=True):
        words += [] if number is None else [name, str(number)]
    return shlex.join(words)
