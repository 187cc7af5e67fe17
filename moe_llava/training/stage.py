"""A stage of a recipe, resolved once: its settings, its folders, the parts that it trains, and the checkpoint that it starts from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, LlavaForConditionalGeneration, PreTrainedModel

from moe_llava.checkpoints.join import joined_config
from moe_llava.checkpoints.load import load_config, load_on_meta
from moe_llava.common.errors import CheckpointError
from moe_llava.common.files import write_whole
from moe_llava.model import SparseConfig, SparseModel
from moe_llava.model.modeling import sparse_class
from moe_llava.model.places import vision_ffns
from moe_llava.model.upcycling import sparse_config
from moe_llava.training.adapters import base_of
from moe_llava.training.parts import is_native, moe_layers
from moe_llava.training.recipe import Distillation, Parts, Recipe, StageSettings

COEFFICIENT = "router_aux_loss_coef"  # the option that a family with experts of its own may have, too
DIGITS_BASE = "runs/digits/base"  # the model of recipes/digits.yaml
# Options that a sparse checkpoint's weights fix; others may change between runs.
STRUCTURE = ("num_experts", "granularity", "num_shared_experts", "moe_layers", "moe_in", "use_residual")


@dataclass(frozen=True, eq=False)
class Stage:
    """Stage `number` of `recipe`. Raises RecipeError if the recipe has no such stage."""

    recipe: Recipe
    number: int

    def __post_init__(self) -> None:
        self.recipe.settings_of(self.number)  # raises if the recipe has no such stage

    @property
    def settings(self) -> StageSettings:
        """Its section of the recipe."""
        return self.recipe.settings_of(self.number)

    @property
    def name(self) -> str:
        return "dense" if self.number == 3 and self.recipe.stage3.dense else f"stage{self.number}"

    @property
    def final(self) -> Path:
        """The folder of the finished stage."""
        return Path(self.recipe.output) / self.name

    @property
    def work(self) -> Path:
        """The folder of the stage until it is finished."""
        return self.final.with_name(f".{self.name}")

    @property
    def trainable(self) -> str:
        """The key of TRAINABLE with the parts of the model that the stage trains, if it has no adapter."""
        return "stage2" if self.number == 3 and self.recipe.stage3.tuned == "all" else self.name

    @property
    def distillation(self) -> Distillation | None:
        return self.recipe.stage3.distillation if self.number == 3 else None

    @property
    def bf16(self) -> bool:
        """Compute in bfloat16: for "auto", where a GPU or CPU has instructions for it; elsewhere it is slower than float32."""
        if self.recipe.precision == "auto":
            if torch.cuda.is_available():
                return torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.cpu._is_avx512_bf16_supported()
        return self.recipe.precision == "bf16"

    @property
    def before(self) -> int | None:
        """The number of the stage before in the recipe; None if this one is the first."""
        return max((number for number in self.recipe.stages if number < self.number), default=None)

    @cached_property
    def origin(self) -> str | Parts:
        """The checkpoint to start from: that of the stage before; the recipe's model, for the first stage, or if it is sparse already, for
        stage III; or the base of an adapter to continue."""
        adapter, model = self.settings.adapter, self.recipe.model
        if adapter and adapter.continue_from:
            return base_of(adapter.continue_from)
        if self.before is None:
            return model
        before = Path(self.recipe.output) / f"stage{self.before}"
        if self.number == 3 and not before.is_dir() and isinstance(model, str) and is_sparse_checkpoint(model):
            return model
        return str(before)

    def upcycles(self, path: str | Parts) -> bool:
        """Return whether the stage has to make the checkpoint that it starts from sparse."""
        return self.name == "stage3" and not (isinstance(path, str) and (is_sparse_checkpoint(path) or is_native(load_on_meta(path))))

    def load_settings(self, path: str) -> dict[str, Any]:
        """Return how a checkpoint is loaded for training: a sparse one with the recipe's options, but for those that its weights fix, and
        one with experts of its family's own with those that the recipe gives."""
        if is_sparse_checkpoint(path):
            options = self._changeable
        else:
            options = {"text_config": self.recipe.stage3.given} if self.recipe.stage3.given and is_native(load_on_meta(path)) else {}
        return {"dtype": torch.float32, "attn_implementation": self.recipe.attention, **options}

    def adapter_base(self, folder: Path) -> str:
        """Return the checkpoint that the stage's adapter belongs to: the origin, or, if that has to become sparse or to take other options,
        the copy of it in `folder`, which is the folder of the stage, before or after it is finished."""
        assert isinstance(self.origin, str), "stage I, which alone starts from parts, has no adapter"
        if self.name != "stage3":
            return self.origin
        config = load_config(self.origin)
        same = isinstance(config, SparseConfig) and all(getattr(config, name) == value for name, value in self._changeable.items())
        return self.origin if same else str(folder / "base")

    @property
    def _changeable(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self.recipe.stage3.options).items() if name not in STRUCTURE}

    def structure(self, path: str | Parts) -> PreTrainedModel:
        """Return the model that the stage begins with, without weights. `path`: its origin, or that of an earlier stage."""
        model = load_structure(path)
        if self.number != 3 or isinstance(model, SparseModel) or is_native(model):
            return model
        return on_meta(sparse_config(model.config, self.recipe.stage3.options))

    def moe_layers(self, model: PreTrainedModel) -> list[int]:
        """Return the layers of `model` that are, or would be, sparse."""
        if isinstance(model, SparseModel):
            return moe_layers(model)
        return moe_layers(model) or sparse_config(model.config, self.recipe.stage3.options).moe_layer_indices

    def vision_ffns(self, model: PreTrainedModel) -> list[str]:
        """Return the names of the FFNs of `model` outside the language model that are, or in stage III would be, sparse."""
        options = model.config if isinstance(model, SparseModel) else self.recipe.stage3.options
        return list(vision_ffns(model, options).values()) if self.number == 3 else []

    def write_recipe(self) -> None:
        """Write the recipe into the stage's folder, which a resumed run compares its own with."""
        self.work.mkdir(parents=True, exist_ok=True)
        write_whole(self.work / "recipe.yaml", yaml.safe_dump(dataclasses.asdict(self.recipe), sort_keys=False))


def is_sparse_checkpoint(path: str) -> bool:
    return isinstance(load_config(path), SparseConfig)


def check_made(model: str) -> None:
    """Raise CheckpointError, with the command that makes it, if `model` is the base of the digits and does not exist."""
    if model == DIGITS_BASE and not Path(model).exists():
        raise CheckpointError(f"{model} does not exist: `moe-llava digits` makes it, with the data that recipes/digits.yaml names")


def load_structure(start: str | Parts) -> PreTrainedModel:
    """Return a checkpoint, or what is joined from parts, without weights. Raises CheckpointError as loading its configuration does."""
    if isinstance(start, str):
        check_made(start)
        return load_on_meta(start)
    with torch.device("meta"):
        return LlavaForConditionalGeneration._from_config(joined_config(start.language_model, start.vision_tower, start.image_size))


def on_meta(config: SparseConfig) -> PreTrainedModel:
    """Return the sparse model of a configuration without weights."""
    with torch.device("meta"):
        return sparse_class(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config.dense_class])._from_config(config)
