"""What an experiment is, read from YAML, and what has been decided of it before its first run.

    title: ...            what is compared
    paper: ...            what the paper found, and where
    baseline: NAME        the cell that the others are compared with
    cells:
      NAME: {set: [stage3.moe.num_experts=2]}     see Cell

Every cell is trained with every seed. `plan.json` in the experiment's folder holds all that was decided, and digests of all data and
checkpoints that are read. Neither can be changed afterwards.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_llava.common.files import write_whole
from moe_llava.common.messages import changes, did_you_mean
from moe_llava.evaluation.ask.calibration import yes_or_no
from moe_llava.evaluation.ask.tasks import prepare
from moe_llava.evaluation.score.benchmark import Benchmark, find_benchmark
from moe_llava.evaluation.score.reading import read_object
from moe_llava.evaluation.stress.perturb import Perturbation, parse_perturbations
from moe_llava.experiments.demo import digits_recipe
from moe_llava.experiments.inputs import benchmark_digests, recipe_digests
from moe_llava.training.parsing import build, flatten, read
from moe_llava.training.recipe import Recipe, RecipeError, SparseStage, Stage, load_recipe, stages_of

HERE = Path(__file__).parent
ABLATIONS = {file.stem: file for file in sorted((HERE / "ablations").glob("*.yaml"))}
TRIAL = HERE / "trial.yaml"
DIGESTS = "digests"  # in plan.json
LOCK = "plan.lock"  # in the folder, held while what all seeds share is written


class ExperimentError(ValueError):
    """Something is wrong with an experiment's file, folder or settings; the message names it and the rule."""


@dataclass
class Cell:
    """One way to train, over the base recipe.

    `set`: settings of the recipe, "a.b=value". `strategy`: which trainings follow each other.

    - three_stages: those of the recipe.
    - merged: stage II is not run by itself; stage III starts from stage I, on the data of both and for as many steps, with the
      optimisation of stage II.
    - sparse_twice: stage II, too, trains the sparse model, with its own data and optimisation.

    `layers`: only so many of the language model's layers, the first ones. `evolve`: experts begin by expert evolution (`evolve_experts`),
    with the gradient of the first batch of stage III's data. `against`: the cell to compare with, if not the experiment's baseline.
    """

    set: list[str] = field(default_factory=list)
    strategy: Literal["three_stages", "merged", "sparse_twice"] = "three_stages"
    layers: int | None = None
    evolve: bool = False
    against: str | None = None


@dataclass
class Experiment:
    """`perturb`: to ask under, too, as `evaluate --perturb` has it. `calibrate`: whether yes and no are also asked for their probability.
    `claim`: the cell on trial."""

    title: str
    paper: str
    baseline: str
    cells: dict
    perturb: str | None = None
    calibrate: bool = False
    claim: str | None = None

    def against(self, cell: str) -> str:
        return self.cells[cell].against or self.baseline


@dataclass(frozen=True)
class Setup:
    """What is said when an experiment is started. `out`: its folder. `data`: the benchmark's files; None stands for the digits world, which
    is written into `out` with so many `images`, to train and to test on, and the recipe is moved to it."""

    out: Path
    recipe: Path
    settings: list[str]
    seeds: int
    benchmark: str = "digits"
    data: Path | None = None
    images: tuple[int | None, int | None] = (None, None)
    batch_size: int = 64


@dataclass(frozen=True)
class Plan:
    """All that decides what comes out. `recipes`: of each cell, with the first seed. `data`: the benchmark's files. `margin`: of the trial,
    a share of all questions; None for an ablation, which has no verdict."""

    out: Path
    experiment: Experiment
    recipes: dict[str, Recipe]
    seeds: list[int]
    benchmark: Benchmark
    data: Path
    perturbations: list[Perturbation]
    margin: float | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "experiment": dataclasses.asdict(self.experiment),
            "recipes": {cell: dataclasses.asdict(recipe) for cell, recipe in self.recipes.items()},
            "seeds": self.seeds,
            "benchmark": self.benchmark.name,
            "data": str(self.data),
            "margin": self.margin,
        }

    def folder(self, cell: str, seed: int) -> Path:
        return self.out / "cells" / cell / f"seed-{seed}"


def find_experiment(name: str) -> Path:
    """The file of a shipped ablation, or a file of one's own. Raises ExperimentError if there is neither."""
    if name in ABLATIONS:
        return ABLATIONS[name]
    if Path(name).is_file():
        return Path(name)
    raise ExperimentError(
        f"no ablation is called {name!r}{did_you_mean(name, ABLATIONS, ';')} There are {', '.join(ABLATIONS)}; or name a YAML file"
    )


def load_experiment(file: Path) -> Experiment:
    """Raises ExperimentError, with every problem found, or RecipeError if the file is no mapping in YAML."""
    problems: list[str] = []
    experiment = build(Experiment, read(file), "", problems)
    if not problems:
        experiment.cells = {name: build(Cell, raw or {}, f"cells.{name}.", problems) for name, raw in experiment.cells.items()}
    if not problems:
        for name in filter(None, (experiment.baseline, experiment.claim, *(cell.against for cell in experiment.cells.values()))):
            if name not in experiment.cells:
                problems.append(f"{name} is to be compared, but no cell is called so: there are {', '.join(experiment.cells)}")
        for name, cell in experiment.cells.items():
            if cell.layers is not None and cell.layers < 1:
                problems.append(f"cells.{name}.layers is {cell.layers}, but must be at least 1")
            if cell.evolve and cell.strategy == "sparse_twice":
                problems.append(f"cells.{name}.evolve is true, but with sparse_twice experts differ before the last stage")
    if problems:
        raise ExperimentError(f"{file}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return experiment


def make_plan(experiment: Experiment, setup: Setup, margin: float | None = None) -> Plan:
    """The digits world has to be there, if it is asked for.

    Raises ExperimentError, RecipeError or BenchmarkError, each naming what is wrong, ground truth and pictures of the benchmark included.
    """
    recipes, benchmark = check_setup(experiment, setup, margin)
    benchmark, folder, questions = prepare(benchmark, setup.data or setup.out / "data")
    _check_scored(benchmark)
    if experiment.calibrate and not yes_or_no(questions):
        raise ExperimentError(f"{benchmark.title} has no questions whose known answer is yes or no, which calibration needs")
    perturbations = [] if experiment.perturb is None else parse_perturbations(experiment.perturb)
    return Plan(setup.out, experiment, recipes, list(range(setup.seeds)), benchmark, folder, perturbations, margin)


def check_setup(experiment: Experiment, setup: Setup, margin: float | None) -> tuple[dict[str, Recipe], Benchmark]:
    """The recipe of each cell, and the benchmark. Raises what can be known to be wrong before there are data."""
    if margin is not None and not 0 < margin < 1:
        raise ExperimentError(f"the margin is {margin}, but must be a share of the questions, such as 0.02 for two in a hundred")
    recipes, problems = {}, []
    for name, cell in experiment.cells.items():
        changes = [*setup.settings, *cell.set, "seed=0"]
        try:
            recipe = load_recipe(setup.recipe, changes)
            recipes[name] = digits_recipe(setup.out, recipe) if setup.data is None else recipe
            steps(recipes[name], cell)
            if cell.layers is not None and not isinstance(recipes[name].model, str):
                raise ExperimentError(f"layers is {cell.layers}, but the recipe's model is joined from parts: name a checkpoint")
        except (RecipeError, ExperimentError) as error:
            problems.append(f"cell {name}: {error}")
    if problems:
        raise ExperimentError("\n".join(problems))
    benchmark = find_benchmark(setup.benchmark)
    _check_scored(benchmark)
    return recipes, benchmark


def _check_scored(benchmark: Benchmark) -> None:
    if benchmark.score is None or not benchmark.headline:
        raise ExperimentError(f"{benchmark.title} is not scored here, so nothing can be compared by it")


def write_plan(plan: Plan) -> None:
    """Writes plan.json, unless it is there.

    Raises ExperimentError if it is there with something else in it: what has been decided before the first run is not changed afterwards,
    nor is the content of what is read. Raises what reading it raises.
    """
    digests = recipe_digests(plan.recipes.values()) | benchmark_digests(plan.benchmark, plan.data, plan.benchmark.questions(plan.data))
    file, now = plan.out / "plan.json", json.loads(json.dumps(plan.as_dict() | {DIGESTS: digests}))
    if not file.is_file():
        plan.out.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(now, indent=1) + "\n")
        return
    planned = read_object(file)
    then = planned.pop(DIGESTS, None)
    before, after = flatten(planned), flatten({key: value for key, value in now.items() if key != DIGESTS})
    if changed := changes(before, after):
        raise ExperimentError(f"{file} was decided before the first run, with {'; '.join(changed)}: choose another --out for another plan")
    if then is None:
        raise ExperimentError(f"{file} has no digests of what was read, as an earlier version wrote it: choose another --out")
    others = [name for name in then | digests if then.get(name) != digests.get(name)]
    if others:
        raise ExperimentError(
            f"the content of {', '.join(others)} is not what it was when {file} was written: put it back, or choose another --out"
        )


@dataclass(frozen=True)
class Step:
    """A training: stage `number` of `recipe`."""

    number: int
    recipe: Recipe


def steps(recipe: Recipe, cell: Cell) -> list[Step]:
    """The trainings of a cell, each from what the one before leaves."""
    below = [Step(number, recipe) for number in stages_of(recipe) if number < 3]
    if cell.strategy == "three_stages":
        return [*below, Step(3, recipe)]
    if recipe.stage2 is None:
        raise RecipeError(f"the strategy {cell.strategy} changes stage II, but the recipe has no stage2")
    below = [step for step in below if step.number == 1]
    if cell.strategy == "merged":
        return [*below, Step(3, dataclasses.replace(recipe, stage3=_merged(recipe.stage2, recipe.stage3)))]
    earlier = dataclasses.replace(recipe.stage3, **{each.name: getattr(recipe.stage2, each.name) for each in dataclasses.fields(Stage)})
    return [*below, Step(3, dataclasses.replace(recipe, stage3=earlier)), Step(3, recipe)]


def _merged(first: Stage, second: SparseStage) -> SparseStage:
    """Stage III on the records of both: of each as many as by itself where both go by epochs; where both go by steps, as many steps, and of
    each file as many records as it has. A file that both have is taken once."""
    one, two = first.optimisation, second.optimisation
    if one.batch_size != two.batch_size or (one.max_steps > 0) != (two.max_steps > 0):
        raise RecipeError("the strategy merged needs stages II and III with one batch_size, both by max_steps or both by epochs")
    for name in ("template", "max_length", "image_aspect_ratio"):
        if getattr(first, name) != getattr(second, name):
            raise RecipeError(f"the strategy merged needs stages II and III with one {name}")
    if one.max_steps > 0:
        sources = [*first.sources, *(source for source in second.sources if source not in first.sources)]
        optimisation = dataclasses.replace(one, max_steps=one.max_steps + two.max_steps)
    else:
        sources = [
            dataclasses.replace(source, weight=source.weight * stage.optimisation.epochs)
            for stage in (first, second)
            for source in stage.sources
        ]
        optimisation = dataclasses.replace(one, epochs=1.0)
    return dataclasses.replace(second, data=sources, optimisation=optimisation)
