"""The demo: MoE-Tuning in minutes on scenes of real handwriting, tested on unseen handwriting, with a report.

Everything is written into one folder, and what exists there is reused:

    data/ base/                    the data set, and the dense model that training starts from
    stage1/ stage2/ stage3/ dense/ a checkpoint after each stage, and of the dense baseline
    answers/*/digits/              every test question with the answer of each checkpoint, and its scores
    routes/                        which experts took which tokens of the test questions: numbers, pictures, a page
    results.json report.html       the numbers, and a page to look at
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moe_llava.checkpoints.load import best_device, load_checkpoint
from moe_llava.common.errors import DataError
from moe_llava.common.files import new_folder, read_lines, write_whole
from moe_llava.common.images import open_image
from moe_llava.common.messages import format_duration
from moe_llava.common.progress import show_progress
from moe_llava.data.store import load_records
from moe_llava.digits.base import build_base
from moe_llava.digits.dataset import TEST_IMAGES, TRAIN_IMAGES, write_dataset
from moe_llava.digits.questions import FAMILIES, NEGATIVE_KINDS
from moe_llava.digits.scenes import STANDARD, Level
from moe_llava.evaluation.ask.answers import read_answers
from moe_llava.evaluation.evaluate import evaluate
from moe_llava.evaluation.score.definitions import digits_world
from moe_llava.experiments.report import CHECKPOINTS, LABELS, write_report
from moe_llava.routing.routes import write_routes
from moe_llava.training.budget import active_parameters
from moe_llava.training.recipe import Data, Recipe, RecipeError
from moe_llava.training.run import train

BATCH = 128


def run_demo(out: Path, recipe: Recipe, train_images: int | None, test_images: int | None) -> None:
    """Raise RecipeError, DataError or CheckpointError, each naming what is wrong, before any training."""
    console = Console()
    recipe = demo_recipe(out, recipe)
    prepare(out, train_images, test_images, console)
    train_with_baseline(recipe, console)
    answered = {name: evaluate_checkpoint(out, name, console) for name in CHECKPOINTS}
    routing = trace_routes(out)
    results = collect_results(out, answered)
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    chat = chat_command(out, answered["sparse"][0]["image"])
    report = write_report(out, results, answered, routing, chat)
    print_summary(results, console)
    print(f"\nreport: {report}\nroutes: {out / 'routes' / 'index.html'}\nchat:   {chat}")


def train_with_baseline(recipe: Recipe, console: Console) -> None:
    """Train the three stages and the dense baseline of the last one, or what of them is not finished yet."""
    train(recipe, [1, 2, 3], resume=True, console=console)
    baseline = copy.deepcopy(recipe)
    baseline.stage3.dense = True
    train(baseline, [3], resume=True, console=console)


def demo_recipe(out: Path, recipe: Recipe) -> Recipe:
    """Return the recipe, moved into the folder `out`. Raise RecipeError if the demo cannot run it."""
    if recipe.stage3.adapter:
        raise RecipeError("stage3.adapter is set, but the demo compares experts with FFNs that are trained in full: leave it out")
    for number in (1, 2):
        recipe.settings_of(number)  # raises if the recipe lacks the stage
    return digits_recipe(out, recipe)


def digits_recipe(out: Path, recipe: Recipe) -> Recipe:
    """Move the recipe into the folder `out`, onto the data that `prepare` writes there, and onto its model. A recipe without stage I keeps
    its own model, which is aligned already."""
    recipe.output = str(out)
    if recipe.stage1 is not None:
        recipe.model = str(out / "base")
    for number, stage in recipe.stages.items():
        stage.data = Data(str(out / "data" / ("captions.json" if number == 1 else "train.json")), str(out / "data" / "images"))
    return recipe


def chat_command(out: Path, image: str) -> str:
    """Return the command that queries the sparse model, with the program as it was called, which may not be on the PATH."""
    return shlex.join([sys.argv[0], "chat", str(out / "stage3"), "--image", image, "how many digits are there?"])


def prepare(out: Path, train_images: int | None, test_images: int | None, console: Console) -> None:
    """Write `out`/data and `out`/base, unless they exist.

    Raise DataError if the data exist with another number of pictures.
    """
    prepare_data(out / "data", {"train": train_images, "test": test_images}, console)
    prepare_base(out / "base")


def prepare_data(data: Path, wanted: dict[str, int | None], console: Console, level: Level = STANDARD) -> None:
    """Write the data set of a level, unless it exists. `wanted`: pictures of "train", "test" and "fresh"; None stands for the usual number.

    Raise DataError if it exists with another number of pictures, or of another level.
    """
    if data.exists():
        folders = {split: data / "images" / split for split in wanted}
        found = {split: len(list(folder.iterdir())) if folder.is_dir() else 0 for split, folder in folders.items()}
        needed = {split: found[split] if number is None else number for split, number in wanted.items()}
        if needed != found:
            there, here = (" and ".join(map(str, numbers.values())) for numbers in (found, needed))
            raise DataError(f"{data} holds {there} pictures, not {here}: remove it first")
        side = open_image(data / "images" / "test" / "000000.png", str(data)).width
        if side != level.canvas:
            raise DataError(f"{data} has pictures of {side} pixels, but the level {level.name} has {level.canvas}: remove it first")
        return
    train, test = wanted["train"] or TRAIN_IMAGES, wanted["test"] or TEST_IMAGES
    fresh = wanted.get("fresh") or 0
    more = f", {fresh:,} more for stage III" if fresh else ""
    console.print(f"drawing {train:,} pictures to train on{more} and {test:,} to test on: {data}", highlight=False, soft_wrap=True)
    with new_folder(data) as folder, show_progress("pictures", train + test + fresh, console) as advance:
        write_dataset(folder, train, test, advance=lambda: advance(1), level=level, fresh_images=fresh)


def prepare_base(base: Path, **parts: Any) -> None:
    """Write the dense model to start from, unless it exists. `parts`: arguments of `build_base`."""
    if not base.exists():
        with new_folder(base) as folder:
            model, processor = build_base(**parts)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)


def evaluate_checkpoint(out: Path, name: str, console: Console) -> list[dict[str, Any]]:
    """Evaluate one checkpoint on the test questions that have no answer yet; return the benchmark's items."""
    folder, data, checkpoint = out / "answers" / name, out / "data", out / CHECKPOINTS[name]
    console.print(f"evaluating {LABELS[name]}: {checkpoint}", highlight=False, soft_wrap=True)
    list(evaluate(str(checkpoint), ["digits"], data, folder, BATCH, None, console))
    questions = digits_world.questions(data)
    return digits_world.score(data, questions, read_answers(folder / "digits", questions)).items


def trace_routes(out: Path, batch_size: int = BATCH) -> dict[str, Any]:
    """Write `out`/routes, unless it exists, from the test questions and their answers; return the routing statistics."""
    if not (out / "routes").exists():
        model, processor = load_checkpoint(out / "stage3", dtype=torch.float32)
        records = load_records(out / "data" / "test.json", out / "data" / "images")
        with new_folder(out / "routes") as folder:
            write_routes(folder, str(out / "stage3"), model.to(best_device()), processor, records, batch_size, "family")
    return json.loads((out / "routes" / "statistics.json").read_text(encoding="utf-8"))


def collect_results(out: Path, answered: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return what results.json holds."""
    return {
        "accuracy": {name: _ordered(digits_world.accuracy(items), ("all", *FAMILIES)) for name, items in answered.items()},
        "sparse_minus_dense": digits_world.compare(answered["sparse"], answered["dense"]),
        "existence": {name: _ordered(digits_world.existence(items), NEGATIVE_KINDS) for name, items in answered.items()},
        **costs(out),
        "test_images": len({item["image"] for item in answered["sparse"]}),
        "threads": torch.get_num_threads(),
    }


def costs(out: Path) -> dict[str, Any]:
    """Return the seconds of training of each checkpoint, and the numbers of parameters."""
    sparse, _ = load_checkpoint(out / "stage3")
    dense, _ = load_checkpoint(out / "dense")
    return {
        "seconds": {name: training_seconds(out / folder) for name, folder in CHECKPOINTS.items()},
        "parameters": {"total": sparse.num_parameters(), "active": active_parameters(sparse), "dense": dense.num_parameters()},
    }


def _ordered(scores: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the scores in the order of `names`, which all tables and pictures then have; others follow."""
    return {name: scores[name] for name in [*names, *scores] if name in scores}


def training_seconds(stage: Path) -> float:
    """Return the seconds in training, in all runs of a stage."""
    return round(float(read_lines(stage / "log.jsonl")[-1]["seconds"]), 1)


def print_summary(results: dict[str, Any], console: Console) -> None:
    table = Table(title=f"accuracy on {results['test_images']} pictures of unseen handwriting", title_justify="left")
    table.add_column("family")
    for name in CHECKPOINTS:
        table.add_column(name, justify="right")
    for family in results["accuracy"]["sparse"]:
        table.add_row(family, *(f"{results['accuracy'][name][family]['mean']:.1%}" for name in CHECKPOINTS))
    console.print(table)
    times = ", ".join(f"{name} {format_duration(results['seconds'][name])}" for name in CHECKPOINTS)
    console.print(f"training: {times}", highlight=False)
