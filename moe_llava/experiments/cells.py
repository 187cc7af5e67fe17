"""Trains and asks the cells of an experiment, each with every seed. Whatever is complete is kept, so a run goes on where it was stopped.

    plan.json                       what was decided before the first run
    data/ base/ models/             the digits world, and models cut to their first layers, where the experiment needs them
    shared/seed-0/stage1-DIGEST/    stages I and II, trained once for all cells that have the same settings up to there
    cells/CELL/seed-0/              stage III as `train` leaves it, answers/, and when all is done cell.json
    results.jsonl                   a line for each cell.json

The seed of a run is the recipe's: it decides the order of records in every stage, and what routers and noise begin with. Cells of one seed
see the same records in the same order, but for merged ones, which have a stage less and shuffle its records among those of stage III. Where
cells share a stage, it is the same checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from moe_llava.checkpoints.load import best_device, load_checkpoint, load_config, load_processor
from moe_llava.common.errors import DataError
from moe_llava.common.files import read_lines, write_whole
from moe_llava.common.progress import show_progress
from moe_llava.data.batches import Collator, ConversationDataset
from moe_llava.evaluation.ask.calibration import calibration, yes_or_no, yes_probabilities
from moe_llava.evaluation.evaluate import evaluate
from moe_llava.evaluation.score.benchmark import Question
from moe_llava.experiments.demo import make_once, training_seconds
from moe_llava.experiments.plan import LOCK, ExperimentError, Plan, Step, steps
from moe_llava.model import MoeLlavaConfig, MoeLlavaProcessor, evolve_experts, upcycle
from moe_llava.training.budget import survey_recipe
from moe_llava.training.recipe import Parts, Recipe, stage_name, stage_settings
from moe_llava.training.run import load_data, train
from moe_llava.training.start import set_aspect_ratio

CELL = "cell.json"


@dataclasses.dataclass(frozen=True)
class CellBudget:
    """`steps`: of its trainings, one after the other, -1 where epochs decide. `flops`: of each, for a token, forward and backward, language
    model only and without attention's scores, which depend on length. `active`: parameters that a token uses, of `total`."""

    steps: list[int]
    flops: list[int]
    active: int
    total: int


def run_cells(plan: Plan, batch_size: int, console: Console) -> list[dict[str, Any]]:
    """Trains and asks what is not done yet; returns what every cell.json holds, cell by cell, in the order of plan and seeds.

    Several processes may be at one folder: each takes the next seed that no other is at, and in the end waits for the others.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ExperimentError("an experiment runs in one process: start it without torchrun")
    budgets = {name: cell_budget(plan, name) for name in plan.recipes}
    for patience in (0, -1):
        for seed in plan.seeds:
            try:
                held = FileLock(plan.out / f"seed-{seed}.lock").acquire(timeout=patience)
            except Timeout:
                console.print(f"seed {seed}: another process is at it")
                continue
            with held:
                run_seed(plan, seed, budgets, batch_size, console)
    return _write_results(plan)


def run_seed(plan: Plan, seed: int, budgets: Mapping[str, CellBudget], batch_size: int, console: Console) -> None:
    for number, name in enumerate(plan.recipes, start=1):
        if not (plan.folder(name, seed) / CELL).is_file():
            console.rule(f"seed {seed}, {name}: {number} of {len(plan.recipes)}")
            result = run_cell(plan, name, seed, budgets[name], batch_size, console)
            write_whole(plan.folder(name, seed) / CELL, json.dumps(result) + "\n")
            _write_results(plan)


def _write_results(plan: Plan) -> list[dict[str, Any]]:
    """results.jsonl, of the cells that are there."""
    files = [plan.folder(name, seed) / CELL for name in plan.recipes for seed in plan.seeds]
    with FileLock(plan.out / LOCK):
        lines = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
        write_whole(plan.out / "results.jsonl", "".join(lines))
    return [json.loads(line) for line in lines]


def cell_budget(plan: Plan, name: str) -> CellBudget:
    """Counted from configurations, without training. Raises what the configurations of recipe and model raise."""
    cell, recipe = plan.experiment.cells[name], plan.recipes[name]
    if cell.layers is not None:
        recipe = dataclasses.replace(recipe, model=str(first_layers(plan.out, str(recipe.model), cell.layers)))
    length, flops = [], []
    for step in steps(recipe, cell):
        budget, costs = survey_recipe(step.recipe, context=0)
        flops.append(costs[stage_name(step.recipe, step.number)].flops)
        length.append(stage_settings(step.recipe, step.number).optimisation.max_steps)
    return CellBudget(length, flops, sum(budget.active.values()), sum(budget.total.values()))


def run_cell(plan: Plan, name: str, seed: int, budget: CellBudget, batch_size: int, console: Console) -> dict[str, Any]:
    """What cell.json holds."""
    folder = plan.folder(name, seed)
    folders = train_cell(plan, name, seed, console)
    names, answers = [plan.benchmark.name], folder / "answers"
    (found,) = evaluate(str(folders[-1]), names, plan.data, answers, batch_size, None, console, plan.perturbations)
    lines = [read_lines(made / "log.jsonl") for made in folders]
    tokens = [max(line.get("tokens", 0) for line in log) for log in lines]
    result = {
        "cell": name,
        "seed": seed,
        "checkpoint": os.path.relpath(folders[-1], plan.out),
        "steps": [log[-1]["step"] for log in lines],
        "tokens": tokens,
        "flops": sum(number * flops for number, flops in zip(tokens, budget.flops, strict=True)),
        "parameters": {"active": budget.active, "total": budget.total},
        "seconds": [training_seconds(made) for made in folders],
        "scores": found["scores"],
    }
    if plan.perturbations:
        result["perturbed"] = {f"{drop['name']}:{drop['strength']}": drop["right"] for drop in found["robustness"]["drops"]}
    if plan.experiment.calibrate:
        result["calibration"] = read_calibration(folders[-1], yes_or_no(plan.benchmark.questions(plan.data)), batch_size, console)
    return result


def train_cell(plan: Plan, name: str, seed: int, console: Console) -> list[Path]:
    """The folders of a cell's trainings, in order."""
    cell, folder = plan.experiment.cells[name], plan.folder(name, seed)
    recipe = dataclasses.replace(plan.recipes[name], seed=seed)
    if cell.layers is not None:
        recipe.model = str(first_layers(plan.out, str(recipe.model), cell.layers))
    before: str | Parts = recipe.model
    todo = steps(recipe, cell)
    made: list[Path] = []
    for step in todo:
        home = folder / f"first{len(made)}"
        if step.number < 3:
            home = plan.out / "shared" / f"seed-{seed}" / f"stage{step.number}-{_digest(step)}"
        elif step is todo[-1]:
            home = folder
            before = before if not cell.evolve else str(evolved(step.recipe, str(before), folder))
        made.append(run_step(step, before, home, console))
        before = str(made[-1])
    return made


def run_step(step: Step, before: str | Parts, home: Path, console: Console) -> Path:
    """Trains a stage in the folder `home`, from `before`: a checkpoint, or what stage I starts from."""
    recipe = dataclasses.replace(step.recipe, output=str(home))
    if step.number == 1 or isinstance(before, Parts) or isinstance(load_config(before), MoeLlavaConfig):
        recipe.model = before
    else:
        _link(home / f"stage{step.number - 1}", before)
    return train(recipe, [step.number], resume=True, console=console)[0]


def _link(place: Path, checkpoint: str) -> None:
    """A stage starts from the one before in its own folder; here that is a link to it."""
    if not Path(checkpoint).is_dir():
        raise ExperimentError(f"{checkpoint} is not a folder, but what stages II and III start from must be one: save the model to one")
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink():
        place.symlink_to(os.path.relpath(checkpoint, place.parent), target_is_directory=True)


def _digest(step: Step) -> str:
    """Tells apart the stages, up to this one, that come out differently."""
    settings = dataclasses.asdict(step.recipe)
    names = ("model", "precision", "attention", "torch_compile", "stage1", "stage2")[: 4 + step.number]
    return hashlib.sha256(json.dumps([settings[name] for name in names]).encode()).hexdigest()[:12]


def first_layers(out: Path, checkpoint: str, number: int) -> Path:
    """The same model with the first `number` layers of its language model. Raises ExperimentError if it has fewer."""

    def write(folder: Path) -> None:
        config = load_config(checkpoint)
        if number > config.text_config.num_hidden_layers:
            raise ExperimentError(f"{checkpoint} has {config.text_config.num_hidden_layers} layers, but the first {number} are asked for")
        model, processor = load_checkpoint(checkpoint)
        model.model.language_model.layers = model.model.language_model.layers[:number]
        model.config.text_config.num_hidden_layers = number
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    make_once(out / "models" / f"layers-{number}", write)
    return out / "models" / f"layers-{number}"


def evolved(recipe: Recipe, dense: str, out: Path) -> Path:
    """The sparse model that stage III would start with, its experts evolved on the first batch of the stage's data."""

    def write(folder: Path) -> None:
        settings = recipe.stage3
        processor = load_processor(dense)
        set_aspect_ratio(processor, settings)
        problems: list[str] = []
        records = load_data(recipe, 3, processor, problems)
        dataset = ConversationDataset(records, processor, settings.template, settings.max_length)
        rows = [dataset[index] for index in range(min(settings.optimisation.batch_size, len(records)))]
        problems += [row["problem"] for row in rows if "problem" in row]
        if problems:
            raise DataError("\n".join(problems))
        at_once = settings.optimisation.per_device_batch_size
        batches = [Collator(processor.tokenizer.pad_token_id)(rows[first : first + at_once]) for first in range(0, len(rows), at_once)]
        model = load_checkpoint(dense, dtype=torch.float32)[0]
        sparse = upcycle(model, **dataclasses.asdict(settings.moe), seed=recipe.seed).to(best_device())
        evolve_experts(sparse, [{key: value.to(sparse.device) for key, value in batch.items()} for batch in batches], seed=recipe.seed)
        sparse.save_pretrained(folder)
        MoeLlavaProcessor.from_llava(processor).save_pretrained(folder)

    make_once(out / "evolved", write)
    return out / "evolved"


def read_calibration(checkpoint: Path, questions: Sequence[Question], batch_size: int, console: Console) -> dict[str, Any]:
    model, processor = load_checkpoint(checkpoint)
    model.to(best_device())
    with show_progress("asking how sure", len(questions), console) as advance:
        probabilities = yes_probabilities(model, processor, questions, batch_size, advance)
    return calibration(probabilities, [question.extra["answer"] == "yes" for question in questions])
