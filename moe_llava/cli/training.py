"""Verbs of training: demo, digits, train, params."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_llava.cli.common import heavy_imports, stops, user_errors, verb

if TYPE_CHECKING:
    from moe_llava.training.budget import Budget, StageCost


RecipeFile = Annotated[Path, typer.Argument(help="a recipe, such as recipes/digits.yaml")]
Stages = Annotated[list[int] | None, typer.Option("--stage", min=1, max=3, help="run this stage only; may be given several times")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="change the recipe: a.b=value")]


@verb("Train", "moe-llava demo")
def demo(
    out: Annotated[Path, typer.Option(help="folder for data, checkpoints and report; what it holds is reused")] = Path("runs/demo"),
    recipe: Annotated[Path | None, typer.Option(help="a recipe instead of the shipped recipes/digits.yaml")] = None,
    settings: Changes = None,
    train_images: Annotated[int | None, typer.Option(min=1, help="pictures to train on")] = None,
    test_images: Annotated[int | None, typer.Option(min=1, help="pictures of unseen handwriting to test on")] = None,
) -> None:
    """Train the three stages on scenes of handwritten digits, evaluate them, and write a report with pictures."""
    with user_errors(), stops():
        from moe_llava.digits import RECIPE
        from moe_llava.training.recipe import load_recipe

        loaded = load_recipe(recipe or RECIPE, settings)

        with heavy_imports():
            from moe_llava.experiments.demo import run_demo  # takes seconds, and a mistake in the recipe is reported first

        run_demo(out, loaded, train_images, test_images)


@verb("Train", "moe-llava digits runs/digits", "moe-llava digits runs/hard --level hard")
def digits(
    out: Annotated[Path, typer.Argument(help="folder to write `data` and `base` into")] = Path("runs/digits"),
    train_images: Annotated[int | None, typer.Option(min=1, help="pictures to train on")] = None,
    test_images: Annotated[int | None, typer.Option(min=1, help="pictures of unseen handwriting to test on")] = None,
    level: Annotated[
        Literal["standard", "hard"], typer.Option(help="hard: more cells, digits, colours and families; its base must be pretrained")
    ] = "standard",
    fresh_images: Annotated[int, typer.Option(min=0, help="pictures of other scenes for stage III, in fresh.json")] = 0,
) -> None:
    """Write the digits data set (LLaVA files) and, in the standard level, the dense model to start from."""
    with user_errors():
        from rich.console import Console

        from moe_llava.digits.scenes import LEVELS
        from moe_llava.experiments.demo import prepare_base, prepare_data

        wanted = {"train": train_images, "test": test_images, "fresh": fresh_images}
        prepare_data(out / "data", wanted, Console(), LEVELS[level])
        print(f"{out / 'data'}: pictures and questions")
        if level == "standard":
            prepare_base(out / "base")
            print(f"{out / 'base'}: the dense model to start from")
        else:
            print("no model to start from: pretrain its parts with python -m moe_llava.digits.pretrain --level hard")


@verb("Train", "moe-llava train recipes/digits.yaml", "moe-llava train recipes/digits.yaml --stage 3 --set seed=1 --resume")
def train(
    recipe: RecipeFile,
    stage: Stages = None,
    settings: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep finished stages, resume an unfinished one")] = False,
) -> None:
    """Run MoE-Tuning: train the projector, then the language model, then the experts."""
    with user_errors(), stops("continue with --resume"):
        from rich.console import Console

        from moe_llava.training.recipe import load_recipe

        loaded = load_recipe(recipe, settings)

        with heavy_imports():
            from accelerate import PartialState

            from moe_llava.training.run import train as run  # takes seconds, and a mistake in the recipe is reported first

        run(loaded, sorted(set(stage or loaded.stages)), resume, Console())
        PartialState().destroy_process_group()  # a process that only ended could be aborted while its neighbours leave


@verb("Train", "moe-llava sbatch recipes/phi2-2.7b.yaml --nodes 2 --gpus-per-node 4")
def sbatch(
    recipe: RecipeFile,
    stage: Stages = None,
    settings: Changes = None,
    nodes: Annotated[int, typer.Option(min=1, help="machines")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each machine, and processes")] = 8,
    cpus_per_gpu: Annotated[int, typer.Option(min=1, help="CPU cores of each process")] = 8,
    time: Annotated[str, typer.Option(help="the job's time limit, as Slurm takes it")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="the partition; default: Slurm's own")] = None,
    save_before: Annotated[
        int, typer.Option(min=60, max=65535, help="seconds before the time limit at which the run saves and stops")
    ] = 300,
    requeue: Annotated[bool, typer.Option(help="continue in a new job of the same id, after the time limit and lost machines")] = True,
) -> None:
    """Print a script for Slurm's sbatch that trains a recipe. Nothing is started."""
    with user_errors():
        from moe_llava.training.recipe import check_processes, load_recipe
        from moe_llava.training.slurm import Job, sbatch_script

        loaded, numbers = load_recipe(recipe, settings), stage or []
        job = Job(nodes, gpus_per_node, cpus_per_gpu, time, partition, save_before, requeue)
        if problem := job.problem():
            raise ValueError(problem)
        check_processes(loaded, job.processes, numbers or loaded.stages)
        options = [word for number in numbers for word in ("--stage", str(number))]
        options += [word for change in settings or [] for word in ("--set", change)]
        print(sbatch_script(job, recipe.stem, [str(recipe), *options]), end="")


@verb("Train", "moe-llava params recipes/digits.yaml")
def params(
    target: Annotated[str, typer.Argument(help="a recipe (.yaml), or a checkpoint, ours or a published one: a folder or a hub id")],
    vision_towers: Annotated[Path | None, typer.Option(help="for a published checkpoint: folder with the vision towers")] = None,
    settings: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Compute a model's parameters, FLOPs and memory from its configuration, without its weights."""
    with user_errors():
        from moe_llava.checkpoints.files import read_config
        from moe_llava.training.recipe import load_recipe

        recipe = load_recipe(target, settings) if Path(target).suffix in (".yaml", ".yml") else None
        if recipe is None:
            if settings:
                raise ValueError(f"--set {settings[0]} changes a recipe, but {target} is a checkpoint")
            read_config(target)  # raises if there is no checkpoint

        with heavy_imports():
            from moe_llava.training.budget import survey  # takes seconds, and a mistake is reported first

        budget, training = survey(recipe or target, vision_towers)
        if as_json:
            costs = {
                "training_bytes": {stage: cost.memory for stage, cost in training.items()},
                "training_peak_bytes": {stage: cost.peak for stage, cost in training.items() if cost.peak is not None},
                "training_flops": {stage: cost.flops for stage, cost in training.items()},
            }
            print(json.dumps(budget.as_dict() | costs))
        else:
            _print_budget(budget, training)


def _print_budget(budget: Budget, training: dict[str, StageCost]) -> None:
    from rich.console import Console
    from rich.table import Table

    from moe_llava.training.budget import CONTEXT

    table = Table("part", "total", "active per token")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, total in budget.total.items():
        table.add_row(part, f"{total:,}", f"{budget.active[part]:,}")
    table.add_section()
    table.add_row("language model", *(f"{number:,}" for number in budget.language_model))
    table.add_row("all", f"{sum(budget.total.values()):,}", f"{sum(budget.active.values()):,}")
    console = Console()
    console.print(table)
    sparse = ""
    if budget.experts:
        layers, outside = ", ".join(map(str, budget.moe_layers)), "".join(f", {label}" for label in budget.vision)
        sparse = (
            f", {len(budget.moe_layers)} of them sparse ({layers}){outside}: {budget.experts[0]} experts, a token uses {budget.experts[1]}"
        )
    lines = [
        f"layers: {budget.layers}{sparse}",
        f"forward pass of the language model: {budget.flops / 1e9:,.3f} GFLOPs per token, at {CONTEXT:,} tokens of context",
        f"cache of keys and values in bfloat16: {budget.cache_bytes:,} bytes per token",
        f"weights in bfloat16: {_megabytes(budget.weight_bytes)}",
        f"generation: {_megabytes(budget.generation_bytes)} for weights and the cache of {CONTEXT:,} tokens",
        *(_training_line(stage, cost) for stage, cost in training.items()),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _training_line(stage: str, cost: StageCost) -> str:
    if cost.activations is None or cost.peak is None or cost.batch is None:
        more = "without activations"
    else:
        batch = f"a micro batch of {cost.batch.rows:,} rows of {cost.batch.length:,} tokens, all with labels"
        if cost.batch.patches:
            batch += f", each with an image of {cost.batch.patches // cost.batch.rows:,} patches"
        more = f"at most {_megabytes(cost.activations)} for activations of {batch}, together {_megabytes(cost.peak)}"
    line = f"training, {stage}: {_megabytes(cost.memory)} on each device for weights, gradients and AdamW, {more}"
    return f"{line}; {cost.flops / 1e9:,.3f} GFLOPs per token"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
