"""Verbs of experiments: ablate, trial."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_llava.cli.common import heavy_imports, stops, user_errors, verb
from moe_llava.digits import RECIPE

ABLATIONS = "strategy, tuned, experts, topk, placement, capacity, size, granularity, balancing, initialisation"

RecipeFile = Annotated[Path | None, typer.Option(help="a base recipe instead of the shipped recipes/digits.yaml")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="change the base recipe: a.b=value")]
Benchmark = Annotated[str, typer.Option(help="the benchmark to evaluate on; `moe-llava benchmarks` lists them")]
BenchmarkData = Annotated[
    Path | None,
    typer.Option(help="folder with the benchmark's files; default: the digits world is generated, and the recipe trains on it"),
]
TrainImages = Annotated[int | None, typer.Option(min=1, help="number of training pictures of the digits world")]
TestImages = Annotated[int | None, typer.Option(min=1, help="number of test pictures, of unseen handwriting")]
BatchSize = Annotated[int, typer.Option(min=1, help="questions per batch")]


def _check(recipe: Path | None, settings: list[str] | None, benchmark: str) -> None:
    """Raise RecipeError or BenchmarkError for a base recipe or a benchmark that cannot be used."""
    from moe_llava.evaluation.score.benchmark import find_benchmark
    from moe_llava.training.recipe import load_recipe

    load_recipe(recipe or RECIPE, settings)
    find_benchmark(benchmark)


@verb("Evaluate", "moe-llava ablate topk --seeds 2")
def ablate(
    name: Annotated[str, typer.Argument(help=f"an ablation of the paper ({ABLATIONS}), or a YAML file")],
    out: Annotated[Path | None, typer.Option(help="output folder; a run resumes from what it holds. Default: runs/ablations/NAME")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="runs of each cell, with the seeds 0, 1, ...")] = 3,
    recipe: RecipeFile = None,
    settings: Settings = None,
    benchmark: Benchmark = "digits",
    data: BenchmarkData = None,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    batch_size: BatchSize = 64,
) -> None:
    """Train the cells of an ablation with several seeds and compare them. The same command resumes a run that was stopped."""
    with user_errors(), stops():
        _check(recipe, settings, benchmark)
        # These take seconds, and a mistake is reported first.
        with heavy_imports():
            from rich.console import Console

            from moe_llava.experiments.ablate import run_ablation
            from moe_llava.experiments.plan import Setup

        folder = out or Path("runs/ablations") / Path(name).stem
        setup = Setup(folder, recipe or RECIPE, settings or [], seeds, benchmark, data, (train_images, test_images), batch_size)
        print(run_ablation(name, setup, Console()))


@verb("Evaluate", "moe-llava trial --margin 0.02 --seeds 5", "moe-llava trial --headline --margin 0.02 --out runs/headline")
def trial(
    margin: Annotated[float, typer.Option(help="how much worse sparse may be, as a share of the questions between 0 and 1, such as 0.02")],
    out: Annotated[Path, typer.Option(help="output folder; a run resumes from what it holds")] = Path("runs/trial"),
    seeds: Annotated[int, typer.Option(min=5, help="runs of each cell, with the seeds 0, 1, ...")] = 5,
    recipe: RecipeFile = None,
    settings: Settings = None,
    benchmark: Benchmark = "digits",
    data: BenchmarkData = None,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    batch_size: BatchSize = 64,
    headline: Annotated[bool, typer.Option("--headline", help="a small sparse model against a large dense one, on harder digits")] = False,
    seed_sd: Annotated[float, typer.Option(help="with --headline: the standard deviation between seeds that is assumed")] = 0.012,
    cell: Annotated[str | None, typer.Option(help="with --headline and --seed: run this cell only")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="with --headline and --cell: run this seed only")] = None,
) -> None:
    """Test the paper's claim: is sparse no worse than dense? The same command resumes a run that was stopped."""
    with user_errors(), stops():
        _check(recipe, settings, benchmark)
        _check_headline(headline, data, train_images, benchmark, cell, seed)
        # These take seconds, and a mistake is reported first.
        with heavy_imports():
            from rich.console import Console

            from moe_llava.experiments.headline import run_headline
            from moe_llava.experiments.plan import Setup
            from moe_llava.experiments.trial import run_trial

        setup = Setup(out, recipe or RECIPE, settings or [], seeds, benchmark, data, (train_images, test_images), batch_size)
        if headline:
            job = None if cell is None or seed is None else (cell, seed)
            report = run_headline(setup, margin, seed_sd, Console(), job)
            print(f"{cell}, seed {seed}: complete" if report is None else report)
        else:
            print(run_trial(setup, margin, Console()))


def _check_headline(
    headline: bool, data: Path | None, train_images: int | None, benchmark: str, cell: str | None, seed: int | None
) -> None:
    """Raise ValueError for options that do not go together."""
    if headline and (data is not None or train_images is not None or benchmark != "digits"):
        raise ValueError("--headline writes its own data, as much as its stages take: leave --data, --train-images and --benchmark out")
    if not headline and (cell is not None or seed is not None):
        raise ValueError("--cell and --seed select a run of --headline")
    if (cell is None) != (seed is None):
        raise ValueError("--cell and --seed are given together")
