"""An experiment, read from YAML, and its plan, decided before the first run.

    title: ...            what is compared
    paper: ...            what the paper found, and where
    baseline: NAME        the cell that the others are compared with
    cells:
      NAME: {set: [stage3.moe.num_experts=2]}     see CellSettings

Every cell is trained with every seed. `plan.json` in the experiment's folder holds all that was decided, with digests of all data and
checkpoints that are read. Neither can be changed afterwards.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_llava.common.errors import DataError
from moe_llava.common.files import write_whole
from moe_llava.common.messages import changes, did_you_mean
from moe_llava.data.files import is_stream, read_items
from moe_llava.data.records import parse_record
from moe_llava.evaluation.ask.calibration import yes_or_no
from moe_llava.evaluation.ask.contents import checkpoint_digests, content_digest, joint_digest, visible
from moe_llava.evaluation.ask.tasks import prepare
from moe_llava.evaluation.score.benchmark import Benchmark, Question, find_benchmark, find_file
from moe_llava.evaluation.score.reading import read_object
from moe_llava.evaluation.stress.perturb import Perturbation, parse_perturbations
from moe_llava.experiments.cells import Cell, CellSettings, ExperimentError, sequence
from moe_llava.experiments.demo import digits_recipe
from moe_llava.training.parsing import build, flatten, read
from moe_llava.training.recipe import Parts, Recipe, RecipeError, load_recipe

HERE = Path(__file__).parent
ABLATIONS = {file.stem: file for file in sorted((HERE / "ablations").glob("*.yaml"))}
TRIAL = HERE / "trial.yaml"
DIGESTS = "digests"  # in plan.json
LOCK = "plan.lock"  # in the folder, held while a process writes what all seeds share


@dataclass
class Experiment:
    """`cells`: name -> CellSettings. `perturb`: perturbations to evaluate under too, as in `evaluate --perturb`. `calibrate`: whether to
    measure the probability of yes. `claim`: the cell on trial."""

    title: str
    paper: str
    baseline: str
    cells: dict
    perturb: str | None = None
    calibrate: bool = False
    claim: str | None = None


@dataclass(frozen=True)
class Setup:
    """The options of a run. `out`: its folder. `data`: the benchmark's files; None stands for the digits world, which is written into `out`
    with `images` (training, test), and the recipe is moved to it."""

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
    """Everything that decides the results. `cells`: with the first seed. `data`: the benchmark's files. `margin`: of the trial, a share of
    all questions; None for an ablation, which has no verdict. `decided`: what else plan.json holds."""

    out: Path
    experiment: Experiment
    cells: dict[str, Cell]
    seeds: list[int]
    benchmark: Benchmark
    data: Path
    perturbations: list[Perturbation]
    margin: float | None
    batch_size: int
    decided: dict[str, Any] = field(default_factory=dict)

    def with_seed(self, seed: int) -> list[Cell]:
        return [cell.with_seed(seed) for cell in self.cells.values()]

    def as_dict(self) -> dict[str, Any]:
        return {
            "experiment": dataclasses.asdict(self.experiment),
            "recipes": {name: dataclasses.asdict(cell.recipe) for name, cell in self.cells.items()},
            "seeds": self.seeds,
            "benchmark": self.benchmark.name,
            "data": str(self.data),
            "margin": self.margin,
            **self.decided,
        }


def find_experiment(name: str) -> Path:
    """Return the file of a shipped ablation, or `name` itself if it is a file. Raise ExperimentError otherwise."""
    if name in ABLATIONS:
        return ABLATIONS[name]
    if Path(name).is_file():
        return Path(name)
    raise ExperimentError(
        f"no ablation is called {name!r}{did_you_mean(name, ABLATIONS, '.')} There are {', '.join(ABLATIONS)}; or name a YAML file"
    )


def load_experiment(file: Path) -> Experiment:
    """Raise ExperimentError, with every problem found, or RecipeError if the file is no mapping in YAML."""
    problems: list[str] = []
    experiment = build(Experiment, read(file), "", problems)
    if not problems:
        experiment.cells = {name: build(CellSettings, raw or {}, f"cells.{name}.", problems) for name, raw in experiment.cells.items()}
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
    """Resolve the cells and check the benchmark, with ground truth and pictures. The digits world must exist, if it is used.

    Raise ExperimentError, RecipeError or BenchmarkError, each naming what is wrong.
    """
    cells, benchmark = check_setup(experiment, setup, margin)
    benchmark, folder, questions = prepare(benchmark, setup.data or setup.out / "data")
    _check_scored(benchmark)
    if margin is not None and len({question.unit for question in questions}) < 2:
        raise ExperimentError(f"all questions of {benchmark.title} are about one picture: a verdict about other pictures needs two")
    if experiment.calibrate and not yes_or_no(questions):
        raise ExperimentError(f"{benchmark.title} has no questions whose known answer is yes or no, which calibration needs")
    perturbations = [] if experiment.perturb is None else parse_perturbations(experiment.perturb)
    seeds = list(range(setup.seeds))
    return Plan(setup.out, experiment, cells, seeds, benchmark, folder, perturbations, margin, setup.batch_size)


def check_setup(experiment: Experiment, setup: Setup, margin: float | None) -> tuple[dict[str, Cell], Benchmark]:
    """Return the cells and the benchmark. Raise what can be known to be wrong before any data exist."""
    if margin is not None and not 0 < margin < 1:
        raise ExperimentError(f"the margin is {margin}, but must be a share of the questions, such as 0.02 for two in a hundred")
    if margin is not None and setup.images[1] == 1:
        raise ExperimentError("the verdict covers other pictures, which a single one says nothing about: --test-images must be at least 2")
    cells, problems = {}, []
    for name, settings in experiment.cells.items():
        try:
            recipe = load_recipe(setup.recipe, [*setup.settings, *settings.set, "seed=0"])
            recipe = digits_recipe(setup.out, recipe) if setup.data is None else recipe
            sequence(recipe, settings.strategy)
            if settings.layers is not None and not isinstance(recipe.model, str):
                raise ExperimentError(f"layers is {settings.layers}, but the recipe's model is joined from parts: name a checkpoint")
        except (RecipeError, ExperimentError) as error:
            problems.append(f"cell {name}: {error}")
        else:
            cells[name] = Cell(name, settings, recipe, setup.out, settings.against or experiment.baseline)
    if problems:
        raise ExperimentError("\n".join(problems))
    benchmark = find_benchmark(setup.benchmark)
    _check_scored(benchmark)
    return cells, benchmark


def _check_scored(benchmark: Benchmark) -> None:
    if benchmark.score is None or not benchmark.headline:
        raise ExperimentError(f"{benchmark.title} is not scored here, so nothing can be compared by it")


def write_plan(plan: Plan) -> None:
    """Write plan.json, unless it exists.

    Raise ExperimentError if it exists with other content: neither a decision nor the content of what is read may change after the first
    run. Raise what reading it raises.
    """
    recipes = [cell.recipe for cell in plan.cells.values()]
    digests = recipe_digests(recipes) | benchmark_digests(plan.benchmark, plan.data, plan.benchmark.questions(plan.data))
    file, now = plan.out / "plan.json", json.loads(json.dumps(plan.as_dict() | {DIGESTS: digests}))
    if not file.is_file():
        plan.out.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(now, indent=1) + "\n")
        return
    planned = read_object(file)
    then = planned.pop(DIGESTS, None)
    del now[DIGESTS]
    if changed := changes(flatten(planned), flatten(now)):
        raise ExperimentError(f"{file} was decided before the first run, with {'; '.join(changed)}: choose another --out for another plan")
    if then is None:
        raise ExperimentError(f"{file} has no digests of what was read, as an earlier version wrote it: choose another --out")
    others = [name for name in then | digests if then.get(name) != digests.get(name)]
    if others:
        raise ExperimentError(
            f"the content of {', '.join(others)} is not what it was when {file} was written: put it back, or choose another --out"
        )


def recipe_digests(recipes: Collection[Recipe]) -> dict[str, str | None]:
    """Return the digest of everything that recipes read: each data file, its images together, and each file of the origin.

    Raise DataError if a data file cannot be read, CheckpointError if a checkpoint cannot.
    """
    found: dict[str, str | None] = {}
    stages = [stage for recipe in recipes for stage in recipe.stages.values()]
    for file, images in dict.fromkeys((source.file, source.images) for stage in stages for source in stage.sources):
        if is_stream(file):
            raise DataError(f"data file {file} is a stream of shards, whose content has no digest: experiments need data files")
        found |= _data_digests(Path(file), Path(images))
    starts = [start for recipe in recipes for start in _starts(recipe)]
    starts += [stage.adapter.continue_from for stage in stages if stage.adapter and stage.adapter.continue_from]
    for start in dict.fromkeys(starts):
        found |= {f"{start}/{name}": digest for name, digest in checkpoint_digests(start).items()}
    return found


def _starts(recipe: Recipe) -> list[str]:
    return [recipe.model.language_model, recipe.model.vision_tower] if isinstance(recipe.model, Parts) else [recipe.model]


def _data_digests(file: Path, folder: Path) -> dict[str, str | None]:
    if file.is_dir():
        digest = joint_digest(visible(file.rglob("*")), file)
    elif file.is_file():
        digest = content_digest(file)
    else:
        raise DataError(f"data file {file} does not exist")
    return {str(file): digest, f"images of {file} in {folder}": joint_digest(_images(file, folder), folder)}


def _images(file: Path, folder: Path) -> Iterator[Path]:
    """Yield the files of images and videos that records name. Images in rows are part of the data file; training reports bad records."""
    for where, item in read_items(file):
        try:
            record = parse_record(where, item, folder)
        except DataError:
            continue
        yield from record.files


def benchmark_digests(benchmark: Benchmark, folder: Path, questions: list[Question]) -> dict[str, str | None]:
    """Return the digest of each file of a benchmark, of a folder among them as a whole, and of the pictures of its questions together."""
    found: dict[str, str | None] = {}
    for path in [find_file(folder, name) for name in benchmark.files] or [folder]:
        found[str(path)] = joint_digest(visible(path.rglob("*")), path) if path.is_dir() else content_digest(path)
    pictures = [image for question in questions for image in question.media if isinstance(image, Path)]
    return found | {f"pictures of {benchmark.title}": joint_digest(pictures, folder)}
