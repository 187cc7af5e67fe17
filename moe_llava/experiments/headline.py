"""The paper's headline in small: does a sparse model with few active parameters match a dense one with twice as many?

Three cells, on the level hard of the digits world, with one tower and the same records in the same order:

    dense_small     a narrow language model; stage III trains the FFNs that become experts in sparse_small
    sparse_small    from the same stage II: MoE-Tuning
    dense_large     a wider language model, with 2 to 2.5 times the active parameters of sparse_small

No stage sees a record twice, and stage III sees none of the scenes of the stages before it. The folder of the experiment:

    parts/{tower,small,large}    pretrained beforehand (`PRETRAIN`)
    data/ base/{small,large}     the data, as many pictures as the stages take, and the dense models to start from
    plan.json, cells/, ...       see running.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.console import Console

from moe_llava.common.files import file_digest
from moe_llava.common.messages import did_you_mean
from moe_llava.digits.scenes import HARD
from moe_llava.evaluation.score.statistics import Interval, detectable_difference, ratio_interval, t_interval
from moe_llava.experiments.ablate import print_budgets, save
from moe_llava.experiments.cells import CellSettings, ExperimentError
from moe_llava.experiments.demo import prepare_base, prepare_data
from moe_llava.experiments.figures import plot_headline
from moe_llava.experiments.plan import LOCK, Experiment, Plan, Setup, check_setup, make_plan, write_plan
from moe_llava.experiments.running import run_cells, run_job
from moe_llava.experiments.summary import by_cell, compare, markdown, signed
from moe_llava.experiments.trial import command, judge, right_answers, write_page
from moe_llava.training.budget import survey_recipe
from moe_llava.training.recipe import Recipe, RecipeError, load_recipe

SMALL, SPARSE, LARGE = "dense_small", "sparse_small", "dense_large"
CELLS = {SMALL: ("small", True), SPARSE: ("small", False), LARGE: ("large", True)}  # base, whether stage III is dense
RATIO = (2.0, 2.5)  # active parameters of the language model, dense_large to sparse_small: 6.7B to 3.6B is 1.9 in the paper
STEPS = [f"stage{number}.optimisation.max_steps={steps}" for number, steps in ((1, 600), (2, 1000), (3, 1000))]
POWER = 0.8
PRETRAIN = {
    "tower": "tower {folder} --level hard",
    "small": "language-model {folder} --level hard --width 96",
    "large": "language-model {folder} --level hard",
}
PAPER = """
The paper's claim: a sparse model with about 3B activated parameters does as well as dense LLaVA-1.5 with 7B, and on hallucination (POPE)
better than 13B. Here all three models have the same tower and data. The small ones share stages I and II; the large one is trained on the
same records in the same order.
"""


@dataclass(frozen=True)
class Gap:
    """How much of the distance between dense_small and dense_large sparse_small covers, by one measure. `values`: of each cell and seed.
    `share`: unbounded if the distance cannot be told apart from 0."""

    measure: str
    values: dict[str, list[float]]
    whole: Interval
    closed: Interval
    share: Interval


def run_headline(setup: Setup, margin: float, seed_sd: float, console: Console, job: tuple[str, int] | None = None) -> Path | None:
    """Run the experiment, or of it one `job`, a cell and a seed. Return the path of report.md, or None after a job.

    `seed_sd`: the standard deviation of a cell's accuracy between seeds that is assumed for the detectable difference.

    Raise what `make_plan`, `train` and `evaluate` raise.
    """
    check_options(setup, seed_sd, job)
    plan = plan_headline(setup, margin, seed_sd, console)
    if job is None:
        return write_report(plan, run_cells(plan, console), command(setup, margin, ["--headline", "--seed-sd", f"{seed_sd:g}"]))
    run_job(plan, *job, console)
    return None


def check_options(setup: Setup, seed_sd: float, job: tuple[str, int] | None) -> None:
    if not 0 < seed_sd < 1:
        raise ExperimentError(f"the standard deviation between seeds is {seed_sd}, but must be a share of the questions, such as 0.01")
    if job is not None and job[0] not in CELLS:
        raise ExperimentError(f"no cell is called {job[0]!r}{did_you_mean(job[0], CELLS, '.')} There are {', '.join(CELLS)}")
    if job is not None and not 0 <= job[1] < setup.seeds:
        raise ExperimentError(f"the seed is {job[1]}, but the seeds of the plan are 0 to {setup.seeds - 1}")


def plan_headline(setup: Setup, margin: float, seed_sd: float, console: Console) -> Plan:
    """Write data, models and plan.json, unless they exist; print what is decided."""
    check_parts(setup.out)
    setup = dataclasses.replace(setup, settings=[*STEPS, *setup.settings, *_data_settings(setup.out / "data")], data=setup.out / "data")
    pictures = pictures_needed(load_recipe(setup.recipe, setup.settings)) | {"test": setup.images[1]}
    experiment = make_experiment(setup.out)
    check_setup(experiment, setup, margin)
    with FileLock(setup.out / LOCK):
        prepare_data(setup.out / "data", pictures, console, HARD)
        for base in ("small", "large"):
            parts = {"tower_folder": setup.out / "parts" / "tower", "text_folder": setup.out / "parts" / base}
            prepare_base(setup.out / "base" / base, level=HARD, **parts)
        plan = make_plan(experiment, setup, margin)
        plan = dataclasses.replace(plan, decided=decisions(plan, seed_sd))
        write_plan(plan)
        print_budgets(plan, console)
    found = plan.decided["detectable_difference"]
    console.print(f"plan.json: {plan_digest(plan)}", highlight=False, soft_wrap=True)
    console.print(f"a true difference of {found:.3g} between two cells is found with a probability of {POWER:.0%}", highlight=False)
    return plan


def check_parts(out: Path) -> None:
    """Raise ExperimentError, with the commands that write them, unless all parts are pretrained."""
    missing = {name: out / "parts" / name for name in PRETRAIN if not (out / "parts" / name / "pretraining.json").is_file()}
    if missing:
        commands = [f"  python -m moe_llava.digits.pretrain {PRETRAIN[name].format(folder=folder)}" for name, folder in missing.items()]
        raise ExperimentError("parts are not pretrained yet, or not to the end. First run\n" + "\n".join(commands))


def make_experiment(out: Path) -> Experiment:
    cells = {}
    for name, (base, dense) in CELLS.items():
        cells[name] = CellSettings(set=[f"model={json.dumps(str(out / 'base' / base))}", f"stage3.dense={json.dumps(dense)}"])
    return Experiment("A small sparse model against a large dense one", PAPER.strip(), LARGE, cells, claim=SPARSE)


def _data_settings(data: Path) -> list[str]:
    files = {"stage1": "captions", "stage2": "train", "stage3": "fresh"}
    sources = {stage: {"file": str(data / f"{name}.json"), "images": str(data / "images")} for stage, name in files.items()}
    return [f"{stage}.data={json.dumps(source)}" for stage, source in sources.items()]


def pictures_needed(recipe: Recipe) -> dict[str, int | None]:
    """Return how many pictures the stages take, if none takes a record twice: stages I and II share theirs.

    Raise RecipeError if a stage is missing, or its length is not a number of steps.
    """
    taken = {}
    for number in (1, 2, 3):
        optimisation = recipe.settings_of(number).optimisation
        if optimisation.max_steps < 1:
            raise RecipeError(f"stage{number}.optimisation.max_steps is {optimisation.max_steps}, but --headline needs a number of steps")
        taken[number] = optimisation.max_steps * optimisation.batch_size
    return {"train": max(taken[1], taken[2]), "fresh": taken[3]}


def decisions(plan: Plan, seed_sd: float) -> dict[str, Any]:
    """Return what plan.json holds beside cells, seeds and margin. Raise ExperimentError if the models' sizes do not suit the question."""
    sizes = {name: survey_recipe(cell.recipe)[0].language_model for name, cell in plan.cells.items()}
    ratio = sizes[LARGE][1] / sizes[SPARSE][1]
    if not RATIO[0] <= ratio <= RATIO[1]:
        raise ExperimentError(
            f"the language model of {LARGE} has {sizes[LARGE][1]:,} active parameters and that of {SPARSE} {sizes[SPARSE][1]:,}: "
            f"the ratio is {ratio:.2f}, but must be {RATIO[0]:g} to {RATIO[1]:g}. Pretrain a language model of another --width"
        )
    return {
        "language_model": {name: {"total": total, "active": active} for name, (total, active) in sizes.items()},
        "active_ratio": ratio,
        "seed_sd": seed_sd,
        "power": POWER,
        # Two cells that vary independently: their difference varies by the root of 2 more than each.
        "detectable_difference": detectable_difference(seed_sd * 2**0.5, len(plan.seeds), POWER),
    }


def plan_digest(plan: Plan) -> str:
    return f"SHA-256 {file_digest(plan.out / 'plan.json')}"


def existence_f1(plan: Plan, results: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return cell -> the mean F1 of the kinds of negatives, of every seed."""
    names = [name for name in results[0]["scores"] if name.startswith("existence/") and name.endswith("/f1")]
    kinds = [by_cell(plan, results, "scores", name) for name in names]
    return {cell: np.mean([kind[cell] for kind in kinds], axis=0).tolist() for cell in plan.cells}


def gap(measure: str, values: Mapping[str, Sequence[float]]) -> Gap:
    small, sparse, large = (np.asarray(values[name]) for name in (SMALL, SPARSE, LARGE))
    whole, closed = (large - small).tolist(), (sparse - small).tolist()
    kept = {name: list(found) for name, found in values.items()}
    return Gap(measure, kept, t_interval(whole), t_interval(closed), ratio_interval(closed, whole))


def write_report(plan: Plan, results: list[dict[str, Any]], repeat: str) -> Path:
    """Write report.md and its pictures; return its path."""
    answers = {cell: right_answers(plan, cell) for cell in plan.cells}
    accuracy = {cell: right_SN.mean(axis=1).tolist() for cell, (right_SN, _) in answers.items()}
    rows = compare(plan, accuracy)
    judged = judge(plan, answers)
    gaps = [gap("accuracy", accuracy), gap("existence F1", existence_f1(plan, results))]
    title = f"Share of the gap in accuracy that experts close: {', '.join(_shares(gaps[0]))}"
    save(plot_headline(rows, plan.decided["language_model"], (SMALL, LARGE), title), plan.out / "headline.png")
    return write_page(
        "headline.md.jinja",
        plan,
        results,
        judged,
        rows,
        digest=plan_digest(plan),
        gaps=gaps,
        gap_table=gap_table(gaps),
        costs=cost_table(plan, results),
        largest_sd=max(row.sd for row in rows),
        command=repeat,
    )


def gap_table(gaps: Sequence[Gap]) -> str:
    lines = [["measure", *CELLS, f"{LARGE} - {SMALL}", f"{SPARSE} - {SMALL}", "share of the gap closed", "95% interval"]]
    for each in gaps:
        means = [f"{np.mean(each.values[name]):.4g}" for name in CELLS]
        differences = [f"{signed(found.mean)} ({signed(found.low)} to {signed(found.high)})" for found in (each.whole, each.closed)]
        lines.append([each.measure, *means, *differences, *_shares(each)])
    return markdown(lines)


def _shares(found: Gap) -> tuple[str, str]:
    """Return the share of the gap and its interval, as text."""
    if not np.isfinite([found.share.low, found.share.high]).all():
        return "not known", "unbounded"
    return f"{found.share.mean:.0%}", f"{found.share.low:.0%} to {found.share.high:.0%}"


def cost_table(plan: Plan, results: Sequence[dict[str, Any]]) -> str:
    """Return the table of what a token costs: computed, but for the time, which is stage III's, mean over the seeds."""
    lines = [["", *CELLS]]
    columns: list[list[str]] = []
    for name in CELLS:
        # Attention scores depend on the length, and are left out as in all budgets of experiments.
        cell = plan.cells[name]
        budget, costs = survey_recipe(cell.recipe, context=0)
        training = costs[cell.trainings[-1].name]
        total, active = budget.language_model
        times = [result["seconds"][-1] / result["tokens"][-1] for result in results if result["cell"] == name]
        whole = sum(budget.active.values()), sum(budget.total.values())
        columns.append(
            [
                *(f"{number:,}" for number in (active, total, *whole)),
                f"{budget.flops / 1e6:.2f}",
                f"{training.flops / 1e6:.2f}",
                f"{budget.weight_bytes / 1e6:.2f}",
                f"{training.memory / 1e6:.1f}",
                f"{1e6 * np.mean(times):.3g}",
            ]
        )
    titles = [
        "language model: active parameters",
        "language model: parameters",
        "with tower and projector: active parameters",
        "with tower and projector: parameters",
        "forward pass: MFLOPs per token",
        "training in stage III: MFLOPs per token",
        "weights in bfloat16: MB",
        "weights, gradients and AdamW in stage III: MB",
        "training in stage III: microseconds per token, measured",
    ]
    return markdown([*lines, *([title, *row] for title, row in zip(titles, zip(*columns, strict=True), strict=True))])
