"""Train and evaluate the cells of an experiment, each with every seed. Complete cells are kept, so a stopped run resumes.

    plan.json        decided before the first run
    data/ base/      the digits world, where the experiment uses it
    models/ shared/ cells/      see cells.py
    results.jsonl    a line for each cell.json

The seed of a run is the recipe's: it decides the order of the records in every stage, and the start of routers and noise. Cells of one seed
see the same records in the same order, except merged ones, which have a stage less and shuffle its records among those of stage III. Cells
that share a stage share its checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from moe_llava.checkpoints.load import best_device, load_checkpoint
from moe_llava.common.files import read_lines, write_whole
from moe_llava.common.progress import show_progress
from moe_llava.evaluation.ask.calibration import calibration, yes_or_no, yes_probabilities
from moe_llava.evaluation.evaluate import evaluate
from moe_llava.experiments.cells import Cell, ExperimentError
from moe_llava.experiments.demo import training_seconds
from moe_llava.experiments.plan import LOCK, Plan


def run_cells(plan: Plan, console: Console) -> list[dict[str, Any]]:
    """Train and evaluate every cell that is not complete; return the content of every cell.json, by cell and seed.

    Several processes may work in one folder: each takes the next seed that no other holds, and finally waits for the others.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ExperimentError("an experiment runs in one process: start it without torchrun")
    for patience in (0, -1):
        for seed in plan.seeds:
            try:
                held = FileLock(plan.out / f"seed-{seed}.lock").acquire(timeout=patience)
            except Timeout:
                console.print(f"seed {seed}: another process is running it")
                continue
            with held:
                run_seed(plan, seed, console)
    return _write_results(plan)


def run_job(plan: Plan, name: str, seed: int, console: Console) -> None:
    """Train and evaluate one cell with one seed, unless it is complete. Cells of one seed share stages, so a job waits for the others of
    its seed."""
    with FileLock(plan.out / f"seed-{seed}.lock"):
        run_seed(plan, seed, console, only=name)


def run_seed(plan: Plan, seed: int, console: Console, only: str | None = None) -> None:
    for number, cell in enumerate(plan.with_seed(seed), start=1):
        if only in (None, cell.name) and not cell.result.is_file():
            console.rule(f"seed {seed}, {cell.name}: {number} of {len(plan.cells)}")
            write_whole(cell.result, json.dumps(run_cell(cell, plan, console)) + "\n")
            _write_results(plan)


def _write_results(plan: Plan) -> list[dict[str, Any]]:
    """Write the results of all complete cells to results.jsonl."""
    files = [cell.with_seed(seed).result for cell in plan.cells.values() for seed in plan.seeds]
    with FileLock(plan.out / LOCK):
        lines = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
        write_whole(plan.out / "results.jsonl", "".join(lines))
    return [json.loads(line) for line in lines]


def run_cell(cell: Cell, plan: Plan, console: Console) -> dict[str, Any]:
    """Train and evaluate one cell; return what its cell.json holds."""
    budget, saved = cell.budget(), cell.train(console)
    (found,) = evaluate(
        str(saved[-1]), [plan.benchmark.name], plan.data, cell.folder / "answers", plan.batch_size, None, console, plan.perturbations
    )
    logs = [read_lines(checkpoint / "log.jsonl") for checkpoint in saved]
    tokens = [max(line.get("tokens", 0) for line in log) for log in logs]
    result = {
        "cell": cell.name,
        "seed": cell.recipe.seed,
        "checkpoint": os.path.relpath(saved[-1], plan.out),
        "steps": [log[-1]["step"] for log in logs],
        "tokens": tokens,
        "flops": sum(number * flops for number, flops in zip(tokens, budget.flops, strict=True)),
        "parameters": {"active": budget.active, "total": budget.total},
        "seconds": [training_seconds(checkpoint) for checkpoint in saved],
        "training": end_of_training(logs[-1]),
        "scores": found["scores"],
    }
    if plan.perturbations:
        result["unperturbed"] = found["robustness"]["clean"]["mean"]
        result["perturbed"] = {f"{drop['name']}:{drop['strength']}": drop["right"] for drop in found["robustness"]["drops"]}
    if plan.experiment.calibrate:
        result["calibration"] = _calibrate(saved[-1], plan, console)
    return result


def end_of_training(log: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return what the last logged steps of a training say: the language loss, and for a sparse model the largest load of an expert, as a
    multiple of an even one, on average over the layers."""
    last = next(line for line in reversed(log) if "loss" in line)
    layers = last.get("expert_shares")
    return {
        "language_loss": last.get("language_loss", last["loss"]),
        "largest_load": None if layers is None else sum(max(shares) * len(shares) for shares in layers) / len(layers),
    }


def _calibrate(checkpoint: Path, plan: Plan, console: Console) -> dict[str, Any]:
    questions = yes_or_no(plan.benchmark.questions(plan.data))
    model, processor = load_checkpoint(checkpoint)
    model.to(best_device())
    with show_progress("probabilities of yes", len(questions), console) as advance:
        probabilities = yes_probabilities(model, processor, questions, plan.batch_size, advance)
    return calibration(probabilities, [question.extra["answer"] == "yes" for question in questions])
