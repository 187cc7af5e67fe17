"""An ablation: cells trained and asked with several seeds, compared with a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from filelock import FileLock
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from moe_llava.common.files import write_whole
from moe_llava.experiments.cells import cell_budget, run_cells
from moe_llava.experiments.demo import prepare
from moe_llava.experiments.figures import plot_comparison
from moe_llava.experiments.plan import LOCK, Experiment, Plan, Setup, check_setup, find_experiment, load_experiment, make_plan, write_plan
from moe_llava.experiments.summary import all_scores, budget_table, by_cell, compare, planned_table, score_table


def run_ablation(name: str, setup: Setup, console: Console) -> Path:
    """Writes results.jsonl, table.md and scores.png, and returns the table.

    Raises what `make_plan`, `train` and `evaluate` raise.
    """
    plan, results = conduct(load_experiment(find_experiment(name)), setup, None, console)
    parts = [f"# {plan.experiment.title}", plan.experiment.paper, conditions(plan)]
    for number, score in enumerate(plan.benchmark.headline, start=1):
        rows = compare(plan, by_cell(plan, results, "scores", score))
        picture = "scores.png" if number == 1 else f"scores-{number}.png"
        save(plot_comparison(rows, score, plan.experiment), plan.out / picture)
        parts += [score_table(score, rows, plan), f"![{score}]({picture})"]
    parts += ["## Budgets", budget_table(plan, results), "## All scores: mean (SD)", all_scores(plan, results)]
    write_whole(plan.out / "table.md", "\n\n".join(part.strip() for part in parts) + "\n")
    return plan.out / "table.md"


def conduct(experiment: Experiment, setup: Setup, margin: float | None, console: Console) -> tuple[Plan, list[dict[str, Any]]]:
    """The plan, written before the first run, and what every cell gave with every seed."""
    check_setup(experiment, setup, margin)
    setup.out.mkdir(parents=True, exist_ok=True)
    with FileLock(setup.out / LOCK):
        if setup.data is None:
            prepare(setup.out, *setup.images, console)
        plan = make_plan(experiment, setup, margin)
        write_plan(plan)
        print_budgets(plan, console)
    return plan, run_cells(plan, setup.batch_size, console)


def save(figure: Figure, file: Path) -> None:
    figure.savefig(file, dpi=110)
    plt.close(figure)


def print_budgets(plan: Plan, console: Console) -> None:
    """What is known before the first run."""
    head, *lines = planned_table(plan, {name: cell_budget(plan, name) for name in plan.recipes})
    table = Table(*head, title=f"{plan.experiment.title}: {len(plan.recipes)} cells, {len(plan.seeds)} seeds", title_justify="left")
    for line in lines:
        table.add_row(*(cell.replace("**", "") for cell in line))
    console.print(table)


def conditions(plan: Plan) -> str:
    """What a reader has to know of the numbers."""
    merged = [name for name, cell in plan.experiment.cells.items() if cell.strategy == "merged"]
    exception = f" ({' and '.join(merged)}: in one order of their own, over the data of stages II and III together)" if merged else ""
    return (
        f"{plan.benchmark.title}, {len(plan.benchmark.questions(plan.data)):,} questions; {len(plan.seeds)} seeds. The seed decides the "
        "order of the records in every stage, and what routers and noise begin with; cells of one seed share "
        f"it{exception}, and the stages before the last where their settings agree. Intervals and p are Student's over the seeds, of "
        "differences those of pairs with the same seed; they do not say what other questions would give."
    )
