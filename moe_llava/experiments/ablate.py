"""An ablation: train and evaluate cells with several seeds, and compare them with a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from filelock import FileLock
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from moe_llava.common.files import write_whole
from moe_llava.evaluation.score.statistics import Interval
from moe_llava.experiments.demo import prepare
from moe_llava.experiments.figures import plot_comparison, plot_perturbed
from moe_llava.experiments.plan import LOCK, Experiment, Plan, Setup, check_setup, find_experiment, load_experiment, make_plan, write_plan
from moe_llava.experiments.running import run_cells
from moe_llava.experiments.summary import (
    Row,
    all_scores,
    budget_table,
    by_cell,
    compare,
    markdown,
    planned_table,
    score_table,
    scores_by_cell,
    training_table,
    undefined,
)


def run_ablation(name: str, setup: Setup, console: Console) -> Path:
    """Write results.jsonl, table.md and scores.png; return the path of table.md.

    Raise what `make_plan`, `train` and `evaluate` raise.
    """
    plan, results = conduct(load_experiment(find_experiment(name)), setup, None, console)
    parts = [f"# {plan.experiment.title}", plan.experiment.paper, conditions(plan)]
    for number, score in enumerate(plan.benchmark.headline, start=1):
        values = scores_by_cell(plan, results, score)
        if gaps := undefined([value for found in values.values() for value in found]):
            parts.append(f"{score}: {gaps} runs")
            continue
        rows = compare(plan, values)
        picture = "scores.png" if number == 1 else f"scores-{number}.png"
        save(plot_comparison(rows, score, plan.experiment.baseline), plan.out / picture)
        parts += [score_table(score, rows), f"![{score}]({picture})"]
    if plan.perturbations:
        rows = compare(plan, by_cell(plan, results, "unperturbed"))
        parts += ["## Under perturbation", perturbed_part(plan, results, rows), "![accuracy under perturbation](perturbed.png)"]
    parts += ["## Budgets", budget_table(plan, results), "## The end of training: mean (SD)", training_table(plan, results)]
    parts += ["## All scores: mean (SD)", all_scores(plan, results)]
    write_whole(plan.out / "table.md", "\n\n".join(part.strip() for part in parts) + "\n")
    return plan.out / "table.md"


def conduct(experiment: Experiment, setup: Setup, margin: float | None, console: Console) -> tuple[Plan, list[dict[str, Any]]]:
    """Write the plan, then run all cells; return the plan and the results of every cell and seed."""
    check_setup(experiment, setup, margin)
    setup.out.mkdir(parents=True, exist_ok=True)
    with FileLock(setup.out / LOCK):
        if setup.data is None:
            prepare(setup.out, *setup.images, console)
        plan = make_plan(experiment, setup, margin)
        write_plan(plan)
        print_budgets(plan, console)
    return plan, run_cells(plan, console)


def save(figure: Figure, file: Path) -> None:
    figure.savefig(file, dpi=110)
    plt.close(figure)


def print_budgets(plan: Plan, console: Console) -> None:
    """Print the budgets, which are known before the first run."""
    head, *lines = planned_table(plan, {name: cell.budget() for name, cell in plan.cells.items()})
    table = Table(*head, title=f"{plan.experiment.title}: {len(plan.cells)} cells, {len(plan.seeds)} seeds", title_justify="left")
    for line in lines:
        table.add_row(*(cell.replace("**", "") for cell in line))
    console.print(table)


def perturbed_part(plan: Plan, results: Sequence[dict[str, Any]], rows: Sequence[Row]) -> str:
    """Return the table of accuracy under perturbation, and draw its picture. `rows`: without perturbation."""
    if not plan.perturbations:
        return ""
    under = {str(each): compare(plan, by_cell(plan, results, "perturbed", str(each))) for each in plan.perturbations}
    under = {"as they are": list(rows), **under}
    save(plot_perturbed(under), plan.out / "perturbed.png")
    lines = [["cell", *under]]
    for place, row in enumerate(rows):
        cells = [found[place] for found in under.values()]
        lines.append([row.cell, *(f"{each.mean.mean:.3f}{_in_brackets(each.difference)}" for each in cells)])
    return markdown(lines)


def _in_brackets(difference: Interval | None) -> str:
    return "" if difference is None else f" ({difference.mean:+.3f} ± {(difference.high - difference.low) / 2:.3f})"


def conditions(plan: Plan) -> str:
    """Return the sentences without which the numbers cannot be read."""
    merged = [cell.name for cell in plan.cells.values() if cell.settings.strategy == "merged"]
    exception = f" ({' and '.join(merged)}: in one order of their own, over the data of stages II and III together)" if merged else ""
    return (
        f"{plan.benchmark.title}, {len(plan.benchmark.questions(plan.data)):,} questions; {len(plan.seeds)} seeds. The seed decides the "
        "order of the records in every stage, and the start of routers and noise; cells of one seed share "
        f"it{exception}, and the stages before the last where their settings agree. Intervals and p are Student's over the seeds; those of "
        "differences are paired by seed. They do not cover other questions."
    )
