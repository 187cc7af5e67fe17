"""Comparisons and tables from the results of cells.

Runs are paired by seed: cells of one seed share data, order and origin, so the difference of a pair varies less than each. An interval over
seeds is Student's, and covers other seeds on the same questions; `evaluation/score/statistics.py` has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_llava.evaluation.score.benchmark import LENIENT
from moe_llava.evaluation.score.statistics import Interval, holm, paired_p, t_interval
from moe_llava.experiments.cells import CellBudget
from moe_llava.experiments.plan import Plan

CLOSE = 0.01  # budgets that differ by no more than this share count as equal
BUDGETS = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs"}  # key of a result -> its name in tables


@dataclass(frozen=True)
class Row:
    """A score of one cell. `values`: of each seed; `sd`: between them. `difference`: from the cell `against`, with `p` of the paired
    t-test, and `p_holm` adjusted for all cells of the table; None for a cell that is compared with nothing."""

    cell: str
    against: str
    values: list[float]
    mean: Interval
    sd: float
    difference: Interval | None = None
    p: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class Kept:
    """What a variant keeps under a perturbation, at both `scales`; `interaction`: the second minus the first, with its adjusted `p`."""

    variant: str
    perturbation: str
    scales: tuple[Interval, Interval]
    interaction: Interval
    p: float


def compare(plan: Plan, values: Mapping[str, Sequence[float]]) -> list[Row]:
    """Return a row for each cell. `values`: cell -> the score of every seed, in the plan's order."""
    against = {name: plan.cells[name].against for name in values}
    differences = {
        name: [mine - other for mine, other in zip(values[name], values[against[name]], strict=True)]
        for name in values
        if against[name] != name
    }
    p = {name: paired_p(found) for name, found in differences.items()}
    adjusted = dict(zip(p, holm(list(p.values())), strict=True))
    rows = []
    for name, found in values.items():
        difference = t_interval(differences[name]) if name in differences else None
        sd = float(np.std(found, ddof=1))
        rows.append(Row(name, against[name], list(found), t_interval(found), sd, difference, p.get(name), adjusted.get(name)))
    return rows


def by_cell(plan: Plan, results: Sequence[dict[str, Any]], *path: str) -> dict[str, list[float]]:
    """Return cell -> the value at `path` of the result of every seed."""
    found: dict[str, list[float]] = {name: [] for name in plan.cells}
    for result in results:
        value: Any = result
        for key in path:
            value = value[key]
        found[result["cell"]].append(float(value))
    return found


def scores_by_cell(plan: Plan, results: Sequence[dict[str, Any]], score: str) -> dict[str, list[float]]:
    """Return cell -> the score of every seed, NaN where it is undefined. A result leaves "x (lenient)" out where it equals x, and a score
    that is undefined."""
    found: dict[str, list[float]] = {name: [] for name in plan.cells}
    for result in results:
        scores = result["scores"]
        found[result["cell"]].append(float(scores.get(score, scores.get(score.removesuffix(LENIENT), math.nan))))
    return found


def score_names(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the scores that any result has."""
    return list(dict.fromkeys(name for result in results for name in result["scores"]))


def undefined(values: Sequence[float]) -> str:
    """Return in how many runs a score is undefined; an empty text if in none."""
    number = sum(map(math.isnan, values))
    return f"undefined in {number} of {len(values)}" if number else ""


def score_table(title: str, rows: Sequence[Row]) -> str:
    """Return a Markdown table of one score."""
    lines = [["cell", title, "SD", "95% interval", "difference", "95% interval", "from", "p", "p (Holm)"]]
    for row in rows:
        line = [row.cell, f"{row.mean.mean:.4g}", f"{row.sd:.4g}", _range(row.mean)]
        if row.difference is None or row.p is None or row.p_holm is None:
            line += [""] * 5
        else:
            line += [signed(row.difference.mean), _range(row.difference), row.against, f"{row.p:.2g}", f"{row.p_holm:.2g}"]
        lines.append(line)
    return markdown(lines)


def planned_table(plan: Plan, budgets: Mapping[str, CellBudget]) -> list[list[str]]:
    """Return the lines of a table of the budgets before the first run, with FLOPs as if all steps had as many tokens."""
    lines = [["cell", "steps", "active parameters", "of", "MFLOPs per token", "equal"]]
    for name, budget in budgets.items():
        pair = (budget, budgets[plan.cells[name].against])
        if any(steps < 0 for each in pair for steps in each.steps):
            equal = "known after the runs"
        else:
            steps = [sum(each.steps) for each in pair]
            flops = [sum(number * flops for number, flops in zip(each.steps, each.flops, strict=True)) for each in pair]
            equal = _equal(plan, name, [what for what, (mine, other) in (("steps", steps), ("FLOPs", flops)) if not _close(mine, other)])
        length = " + ".join("epochs" if steps < 0 else str(steps) for steps in budget.steps)
        each_flops = " + ".join(f"{flops / 1e6:.2f}" for flops in budget.flops)
        lines.append([name, length, f"{budget.active:,}", f"{budget.total:,}", each_flops, equal])
    return lines


def budget_table(plan: Plan, results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the budgets that the runs used, in all stages: means over seeds."""
    totals = {
        what: {name: [float(np.sum(result[what])) for result in results if result["cell"] == name] for name in plan.cells}
        for what in (*BUDGETS, "seconds")
    }
    lines = [["cell", "steps", "tokens", "active parameters", "of", "TFLOPs", "seconds", "equal to what it is compared with"]]
    for name, cell in plan.cells.items():
        differs = [label for what, label in BUDGETS.items() if not all(map(_close, totals[what][name], totals[what][cell.against]))]
        mean = {what: float(np.mean(found[name])) for what, found in totals.items()}
        parameters = next(result["parameters"] for result in results if result["cell"] == name)
        counts = [f"{mean['steps']:,.0f}", f"{mean['tokens']:,.0f}", f"{parameters['active']:,}", f"{parameters['total']:,}"]
        lines.append([name, *counts, f"{mean['flops'] / 1e12:,.3g}", f"{mean['seconds']:,.0f}", _equal(plan, name, differs)])
    return markdown(lines)


def training_table(plan: Plan, results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of how training ended: mean and standard deviation over seeds."""
    lines = [["cell", "language loss", "largest load of an expert"]]
    for name in plan.cells:
        ends = [result["training"] for result in results if result["cell"] == name]
        columns = [[end[key] for end in ends] for key in ("language_loss", "largest_load")]
        lines.append([name, *("" if None in found else f"{np.mean(found):.4g} ({np.std(found, ddof=1):.2g})" for found in columns)])
    return markdown(lines)


def all_scores(plan: Plan, results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of every score of the benchmark: mean and standard deviation over seeds."""
    lines = [["score", *plan.cells]]
    for score in score_names(results):
        values = scores_by_cell(plan, results, score).values()
        lines.append([score, *(undefined(found) or f"{np.mean(found):.4g} ({np.std(found, ddof=1):.2g})" for found in values)])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a table whose first line is the head; all columns but the first are numbers."""
    head, *rest = lines
    rows = [head, ["---", *("---:" for _ in head[1:])], *rest]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def signed(value: float) -> str:
    """Return a difference with its sign; a rounding error around 0 is +0."""
    return f"{round(value, 6) + 0.0:+.3g}"


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= CLOSE * max(abs(a), abs(b))


def _equal(plan: Plan, name: str, differs: Sequence[str]) -> str:
    if plan.cells[name].against == name:
        return ""
    return f"**no: {', '.join(differs)}**" if differs else "yes"


def _range(interval: Interval) -> str:
    return f"{round(interval.low, 6) + 0.0:.3g} to {round(interval.high, 6) + 0.0:.3g}"
