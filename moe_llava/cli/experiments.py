"""Verbs of experiments: ablate, trial."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_llava.cli.common import app, stops, user_errors
from moe_llava.digits import RECIPE

RecipeFile = Annotated[Path | None, typer.Option(help="a base recipe instead of the shipped recipes/digits.yaml")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="change the base recipe: a.b=value")]
Benchmark = Annotated[str, typer.Option(help="what to ask; `moe-llava benchmarks` lists them")]
BenchmarkData = Annotated[
    Path | None,
    typer.Option(help="the benchmark's files; without it, the digits world is written, and the recipe is moved to it"),
]
TrainImages = Annotated[int | None, typer.Option(help="pictures of the digits world to train on")]
TestImages = Annotated[int | None, typer.Option(help="pictures of unseen handwriting to test on")]
BatchSize = Annotated[int, typer.Option(min=1, help="questions at once")]


@app.command()
def ablate(
    name: Annotated[str, typer.Argument(help="an ablation of the paper, or a YAML file; an unknown name lists them")],
    out: Annotated[Path | None, typer.Option(help="folder; what it holds is reused. Default: runs/ablations/NAME")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="runs of each cell, with the seeds 0, 1, ...")] = 3,
    recipe: RecipeFile = None,
    settings: Settings = None,
    benchmark: Benchmark = "digits",
    data: BenchmarkData = None,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    batch_size: BatchSize = 64,
) -> None:
    """Trains the cells of an ablation with several seeds, and compares them. Run again, it goes on where it was stopped."""
    with user_errors(), stops():
        from rich.console import Console

        from moe_llava.experiments.ablate import run_ablation
        from moe_llava.experiments.plan import Setup

        folder = out or Path("runs/ablations") / Path(name).stem
        setup = Setup(folder, recipe or RECIPE, settings or [], seeds, benchmark, data, (train_images, test_images), batch_size)
        print(run_ablation(name, setup, Console()))


@app.command()
def trial(
    margin: Annotated[float, typer.Option(help="by how much sparse may be worse, as a share of the questions, such as 0.02")],
    out: Annotated[Path, typer.Option(help="folder; what it holds is reused")] = Path("runs/trial"),
    seeds: Annotated[int, typer.Option(min=5, help="runs of each cell, with the seeds 0, 1, ...")] = 5,
    recipe: RecipeFile = None,
    settings: Settings = None,
    benchmark: Benchmark = "digits",
    data: BenchmarkData = None,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    batch_size: BatchSize = 64,
) -> None:
    """Puts the paper's claim on trial: is sparse no worse than dense? Run again, it goes on where it was stopped."""
    with user_errors(), stops():
        from rich.console import Console

        from moe_llava.experiments.plan import Setup
        from moe_llava.experiments.trial import run_trial

        setup = Setup(out, recipe or RECIPE, settings or [], seeds, benchmark, data, (train_images, test_images), batch_size)
        print(run_trial(setup, margin, Console()))
