"""The main job in minutes: MoE-Tuning on scenes of real handwriting, tested on handwriting never seen, with a report.

Everything it makes stands in one folder, and what is there already is not made again:

    data/ base/                    the data set, and the dense model that training starts from
    stage1/ stage2/ stage3/ dense/ a checkpoint after each stage, and of the dense control
    answers/*/digits/              every test question with the answer of each checkpoint, and its scores
    routes/                        which experts took which tokens of the test questions: numbers, pictures, a page
    results.json report.html       the numbers, and a page to look at
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moe_llava.checkpoints.load import best_device, load_checkpoint
from moe_llava.common.errors import DataError
from moe_llava.common.files import write_whole
from moe_llava.data.store import load_records
from moe_llava.digits.base import build_base
from moe_llava.digits.dataset import TEST_IMAGES, TRAIN_IMAGES, write_dataset
from moe_llava.evaluation.ask.answers import read_answers
from moe_llava.evaluation.evaluate import evaluate
from moe_llava.evaluation.score.definitions import digits_world
from moe_llava.experiments.report import CHECKPOINTS, read_log, write_report
from moe_llava.routing.routes import write_routes
from moe_llava.training.budget import active_parameters
from moe_llava.training.recipe import Data, Recipe, RecipeError, stage_settings
from moe_llava.training.run import train

BATCH = 128


def run_demo(out: Path, recipe: Recipe, train_images: int | None, test_images: int | None) -> None:
    """Raises RecipeError, DataError or CheckpointError, each naming what is wrong, before any training."""
    console = Console()
    recipe = demo_recipe(out, recipe)
    prepare(out, train_images, test_images, console)
    train(recipe, [1, 2, 3], resume=True, console=console)
    control = copy.deepcopy(recipe)
    control.stage3.dense = True
    train(control, [3], resume=True, console=console)

    answered = {name: ask_checkpoint(out, name, console) for name in CHECKPOINTS}
    routing = read_routing(out, console)
    results = collect_results(out, answered)
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    report = write_report(out, results, answered, routing, chat_command(out, answered["sparse"][0]["image"]))
    print_summary(results, console)
    print(f"\nreport: {report}\nchat:   {chat_command(out, answered['sparse'][0]['image'])}")


def demo_recipe(out: Path, recipe: Recipe) -> Recipe:
    """The recipe, moved into the folder `out`."""
    if recipe.stage3.adapter:
        raise RecipeError("stage3.adapter is set, but the demo compares experts with FFNs that are trained in full: leave it out")
    return digits_recipe(out, recipe)


def digits_recipe(out: Path, recipe: Recipe) -> Recipe:
    """The recipe, moved into the folder `out`, on the data and the model that `prepare` writes there."""
    recipe.model, recipe.output = str(out / "base"), str(out)
    for stage, name in zip((stage_settings(recipe, number) for number in (1, 2, 3)), ("captions", "train", "train"), strict=True):
        stage.data = Data(str(out / "data" / f"{name}.json"), str(out / "data" / "images"))
    return recipe


def chat_command(out: Path, image: str) -> str:
    """What to type to ask the sparse model; with the program as it was called, which need not be on the PATH."""
    return shlex.join([sys.argv[0], "chat", str(out / "stage3"), "--image", image, "how many digits are there?"])


def prepare(out: Path, train_images: int | None, test_images: int | None, console: Console) -> None:
    """Writes `out`/data and `out`/base, unless they are there.

    Raises DataError if data are there, but not of the size asked for.
    """
    asked = (train_images, test_images)
    if (out / "data").exists():
        found = tuple(len(list((out / "data" / "images" / split).iterdir())) for split in ("train", "test"))
        wanted = tuple(number or there for number, there in zip(asked, found, strict=True))
        if wanted != found:
            raise DataError(f"{out / 'data'} holds {found[0]} and {found[1]} pictures, not {wanted[0]} and {wanted[1]}: remove it first")
    numbers = (train_images or TRAIN_IMAGES, test_images or TEST_IMAGES)

    def data(folder: Path) -> None:
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("drawing digits", total=sum(numbers))
            write_dataset(folder, *numbers, advance=lambda: progress.advance(task))

    def base(folder: Path) -> None:
        model, processor = build_base()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    make_once(out / "data", data)
    make_once(out / "base", base)


def make_once(path: Path, make: Callable[[Path], None]) -> None:
    """Calls `make` with a folder beside `path` and renames it, unless `path` exists: what exists is always complete."""
    if path.exists():
        return
    partial = path.with_name(f".{path.name}")
    partial.mkdir(parents=True, exist_ok=True)
    make(partial)
    partial.rename(path)


def ask_checkpoint(out: Path, name: str, console: Console) -> list[dict[str, Any]]:
    """Puts every test question that has no answer yet to one checkpoint; returns the benchmark's items."""
    folder, data = out / "answers" / name, out / "data"
    list(evaluate(str(out / CHECKPOINTS[name]), ["digits"], data, folder, BATCH, None, console))
    questions = digits_world.questions(data)
    return digits_world.score(data, questions, read_answers(folder / "digits", questions)).items


def read_routing(out: Path, console: Console) -> dict[str, Any]:
    """What RoutingStatistics says of the test questions, and their answers."""

    def routes(folder: Path) -> None:
        model, processor = load_checkpoint(out / "stage3", dtype=torch.float32)
        records = load_records(out / "data" / "test.json", out / "data" / "images")
        write_routes(folder, str(out / "stage3"), model.to(best_device()), processor, records, BATCH, "family", console)

    make_once(out / "routes", routes)
    return json.loads((out / "routes" / "statistics.json").read_text(encoding="utf-8"))


def collect_results(out: Path, answered: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What results.json holds."""
    sparse, _ = load_checkpoint(out / "stage3")
    dense, _ = load_checkpoint(out / "dense")
    return {
        "accuracy": {name: digits_world.accuracy(items) for name, items in answered.items()},
        "sparse_minus_dense": digits_world.compare(answered["sparse"], answered["dense"]),
        "existence": {name: digits_world.existence(items) for name, items in answered.items()},
        "seconds": {name: training_seconds(out / folder) for name, folder in CHECKPOINTS.items()},
        "parameters": {
            "total": sparse.num_parameters(),
            "active": active_parameters(sparse),
            "dense": dense.num_parameters(),
        },
        "test_images": len({item["image"] for item in answered["sparse"]}),
        "threads": torch.get_num_threads(),
    }


def training_seconds(stage: Path) -> float:
    """Time in training, all runs of an interrupted stage together: each counts its seconds from 0."""
    seconds = [line["seconds"] for line in read_log(stage)]
    ends = [now for now, then in zip(seconds, [*seconds[1:], 0.0], strict=True) if then < now]
    return round(sum(ends), 1)


def print_summary(results: dict[str, Any], console: Console) -> None:
    table = Table(title=f"accuracy on {results['test_images']} pictures of unseen handwriting", title_justify="left")
    table.add_column("family")
    for name in CHECKPOINTS:
        table.add_column(name, justify="right")
    for family in results["accuracy"]["sparse"]:
        table.add_row(family, *(f"{results['accuracy'][name][family]['mean']:.1%}" for name in CHECKPOINTS))
    seconds = results["seconds"]
    table.add_row("training", *(f"{seconds[name]:.0f} s" for name in CHECKPOINTS))
    console.print(table)
