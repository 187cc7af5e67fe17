"""A cell of an experiment, resolved: its settings, recipe, folders and trainings; how it is trained.

models/layers-2/                a model cut to its first layers, where a cell needs one
shared/seed-0/stage1-DIGEST/    stages I and II, trained once for all cells with the same settings up to there
cells/CELL/seed-0/              stage III as `train` leaves it, answers/, and finally cell.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from moe_llava.checkpoints.load import best_device, check_weights, load_checkpoint, load_config, load_processor
from moe_llava.checkpoints.processors import sparse_processor
from moe_llava.common.errors import DataError
from moe_llava.common.files import new_folder
from moe_llava.common.messages import first_line
from moe_llava.data.batches import Collator, ConversationDataset
from moe_llava.data.encoder import Encoder
from moe_llava.model import SparseConfig, evolve_experts, upcycle
from moe_llava.model.places import find_backbone
from moe_llava.training.budget import survey_recipe
from moe_llava.training.checks import load_data
from moe_llava.training.recipe import Parts, Recipe, RecipeError, SparseStageSettings, StageSettings
from moe_llava.training.run import train
from moe_llava.training.stage import Stage
from moe_llava.training.start import prepare_images

PER_LAYER = ("layer_types", "mlp_layer_types")  # of a configuration: lists with an entry for each layer
Strategy = Literal["three_stages", "merged", "sparse_twice"]


class ExperimentError(ValueError):
    """The file, folder or settings of an experiment are invalid; the message names them and the rule."""


@dataclass
class CellSettings:
    """A cell as the experiment's YAML file has it.

    `set`: settings of the recipe, "a.b=value". `strategy`: the order of the trainings.

    - three_stages: the stages of the recipe.
    - merged: no stage II; stage III starts from stage I, on the data of both and for as many steps, with the optimisation of stage II.
    - sparse_twice: stage II trains the sparse model too, with its own data and optimisation.

    `layers`: keep only the first layers of the language model. `evolve`: start stage III with evolved experts (`evolve_experts`), by the
    gradient of the first `batch_size` records of its data, which are not shuffled. `against`: the cell to compare with, if not the
    experiment's baseline.
    """

    set: list[str] = field(default_factory=list)
    strategy: Strategy = "three_stages"
    layers: int | None = None
    evolve: bool = False
    against: str | None = None


@dataclass(frozen=True)
class CellBudget:
    """`steps`: of each training, -1 where epochs decide. `flops`: of each training per token, forward and backward pass of the language
    model, without attention scores, which depend on length. `active`: parameters that a token uses, of `total`."""

    steps: list[int]
    flops: list[int]
    active: int
    total: int


@dataclass(frozen=True)
class Cell:
    """A cell with one seed. `recipe`: with the cell's settings and the seed. `out`: the experiment's folder. `against`: the cell to compare
    with, which is the baseline itself for the baseline."""

    name: str
    settings: CellSettings
    recipe: Recipe
    out: Path
    against: str

    def with_seed(self, seed: int) -> Cell:
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, seed=seed))

    @property
    def folder(self) -> Path:
        return self.out / "cells" / self.name / f"seed-{self.recipe.seed}"

    @property
    def result(self) -> Path:
        """The file that exists once the cell is complete."""
        return self.folder / "cell.json"

    @property
    def origin(self) -> str | Parts:
        """The checkpoint that the first training starts from, or the parts to join. `prepare_origin` writes it, if layers are cut."""
        return self.recipe.model if self.settings.layers is None else str(self._cut_model)

    @property
    def _cut_model(self) -> Path:
        return self.out / "models" / f"layers-{self.settings.layers}"

    @property
    def trainings(self) -> list[Stage]:
        """The trainings in order; each starts from the checkpoint that the one before saves."""
        *earlier, last = sequence(dataclasses.replace(self.recipe, model=self.origin), self.settings.strategy)
        shared = self.out / "shared" / f"seed-{self.recipe.seed}"
        found = []
        for place, each in enumerate(earlier):
            home = shared / f"stage{each.number}-{_digest(each)}" if each.number < 3 else self.folder / f"first{place}"
            found.append(_saved_in(home, each))
        return [*found, _saved_in(self.folder, last)]

    def prepare_origin(self) -> None:
        """Write the model with the first layers, if the cell needs it and it does not exist yet."""
        layers = self.settings.layers
        if layers is not None and not self._cut_model.exists():
            cut_layers(str(self.recipe.model), layers, self._cut_model)

    def budget(self) -> CellBudget:
        """Count from configurations, without training. Raise what the configurations of recipe and model raise."""
        self.prepare_origin()
        steps, flops = [], []
        for each in self.trainings:
            budget, costs = survey_recipe(each.recipe, context=0)
            flops.append(costs[each.name].flops)
            steps.append(each.settings.optimisation.max_steps)
        return CellBudget(steps, flops, sum(budget.active.values()), sum(budget.total.values()))

    def train(self, console: Console) -> list[Path]:
        """Run the trainings that are not complete; return the checkpoint of each, in order."""
        self.prepare_origin()
        start, saved = self.origin, []
        trainings = self.trainings
        for each in trainings:
            if self.settings.evolve and each is trainings[-1]:
                start = evolve(each.recipe, str(start), self.folder / "evolved")
            saved.append(run_training(each, start, console))
            start = str(saved[-1])
        return saved


def sequence(recipe: Recipe, strategy: Strategy) -> list[Stage]:
    """Return the trainings of a strategy. Raise RecipeError if the recipe does not allow it."""
    below = [Stage(recipe, number) for number in recipe.stages if number < 3]
    if strategy == "three_stages":
        return [*below, Stage(recipe, 3)]
    if recipe.stage2 is None:
        raise RecipeError(f"the strategy {strategy} changes stage II, but the recipe has no stage2")
    below = [each for each in below if each.number == 1]
    if strategy == "merged":
        return [*below, Stage(dataclasses.replace(recipe, stage3=_merged(recipe.stage2, recipe.stage3)), 3)]
    shared = {each.name: getattr(recipe.stage2, each.name) for each in dataclasses.fields(StageSettings)}
    earlier = dataclasses.replace(recipe.stage3, **shared)
    return [*below, Stage(dataclasses.replace(recipe, stage3=earlier), 3), Stage(recipe, 3)]


def _merged(first: StageSettings, second: SparseStageSettings) -> SparseStageSettings:
    """Return stage III on the records of both stages. With epochs, each source keeps its number of records; with steps, the steps add up
    and sources are weighted by size. A source that both have is taken once then."""
    one, two = first.optimisation, second.optimisation
    if one.batch_size != two.batch_size or (one.max_steps > 0) != (two.max_steps > 0):
        raise RecipeError("the strategy merged needs stages II and III with one batch_size, both by max_steps or both by epochs")
    for name in ("template", "max_length", "image_aspect_ratio", "image_processor", "video_processor"):
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


def _digest(training: Stage) -> str:
    """Return a digest of the settings that decide the checkpoint of stage I or II."""
    settings = dataclasses.asdict(training.recipe)
    names = ("model", "precision", "attention", "torch_compile", "stage1", "stage2")[: 4 + training.number]
    return hashlib.sha256(json.dumps([settings[name] for name in names]).encode()).hexdigest()[:12]


def _saved_in(home: Path, training: Stage) -> Stage:
    return dataclasses.replace(training, recipe=dataclasses.replace(training.recipe, output=str(home)))


def run_training(training: Stage, start: str | Parts, console: Console) -> Path:
    """Train from `start`, unless that is done, and return the checkpoint."""
    recipe = training.recipe
    if training.before is None or isinstance(start, Parts) or isinstance(load_config(start), SparseConfig):
        recipe = dataclasses.replace(recipe, model=start)
    else:
        _link(Path(recipe.output) / f"stage{training.before}", start)
    return train(recipe, [training.number], resume=True, console=console)[0]


def _link(place: Path, checkpoint: str) -> None:
    """Link to the checkpoint where a stage looks for the one before it: in its own folder."""
    if not Path(checkpoint).is_dir():
        raise ExperimentError(f"{checkpoint} is not a folder, but stages II and III must start from one: save the model to a folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink():
        place.symlink_to(os.path.relpath(checkpoint, place.parent), target_is_directory=True)


def cut_layers(checkpoint: str, layers: int, out: Path) -> None:
    """Save the model with the first `layers` of its language model. Raise ExperimentError if it has fewer, or cannot do without the
    others."""
    found = load_config(checkpoint).get_text_config().num_hidden_layers
    if layers > found:
        raise ExperimentError(f"{checkpoint} has {found} layers, but the experiment needs the first {layers}")
    model, processor = load_checkpoint(checkpoint)
    backbone = find_backbone(model)[1]
    backbone.layers = backbone.layers[:layers]
    text = model.config.get_text_config()
    text.num_hidden_layers = layers
    for name in PER_LAYER:
        if types := vars(text).get(name):
            setattr(text, name, types[:layers])
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        try:
            check_weights(folder)
        except ValueError as error:
            raise ExperimentError(f"{checkpoint} cannot be cut to its first {layers} layers: {first_line(error)}") from error


def evolve(recipe: Recipe, dense: str, out: Path) -> str:
    """Save in `out`, unless it exists, the sparse model of stage III with experts evolved on the first `batch_size` records of the stage's
    data, in the order of the files; return its path."""
    if out.exists():
        return str(out)
    settings = recipe.stage3
    processor = load_processor(dense)
    prepare_images(processor, settings)
    encoder = Encoder(processor, settings.template, settings.max_length)
    problems: list[str] = []
    records = load_data(Stage(recipe, 3), [encoder], problems)
    dataset = ConversationDataset(records, encoder)
    rows = [dataset[index] for index in range(min(settings.optimisation.batch_size, len(records)))]
    problems += [row["problem"] for row in rows if "problem" in row]
    if problems:
        raise DataError("\n".join(problems))
    at_once = settings.optimisation.per_device_batch_size
    batches = [Collator(encoder.nothing())(rows[first : first + at_once]) for first in range(0, len(rows), at_once)]
    model = load_checkpoint(dense, dtype=torch.float32)[0]
    sparse = upcycle(model, **dataclasses.asdict(settings.options), seed=recipe.seed).to(best_device())
    evolve_experts(sparse, [{key: value.to(sparse.device) for key, value in batch.items()} for batch in batches], seed=recipe.seed)
    with new_folder(out) as folder:
        sparse.save_pretrained(folder)
        sparse_processor(processor).save_pretrained(folder)
    return str(out)
