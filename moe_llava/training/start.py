"""What a stage starts from: which checkpoint, whether it can, and the model and processor as training takes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import LlavaForConditionalGeneration

from moe_llava.checkpoints.files import check_checkpoint
from moe_llava.checkpoints.join import join, joined_processor
from moe_llava.checkpoints.load import check_weights, load_checkpoint, load_config, load_processor
from moe_llava.common.errors import CheckpointError
from moe_llava.common.files import new_folder, write_whole
from moe_llava.model import MoeLlavaConfig, MoeLlavaForConditionalGeneration, MoeLlavaProcessor, upcycle
from moe_llava.model.upcycling import sparse_config
from moe_llava.training.adapters import base_of, load_base
from moe_llava.training.budget import on_meta, start_on_meta
from moe_llava.training.checksums import write_manifest
from moe_llava.training.recipe import Parts, Recipe, RecipeError, Stage, stage_settings
from moe_llava.training.saves import saving, work_folder
from moe_llava.training.sharding import load_sharded, shared_folder


def origin(recipe: Recipe, number: int) -> str | Parts:
    """The checkpoint that a stage starts from: the one before it, or the recipe's model, which stage I may start from in parts, or the base
    of an adapter to go on from. A model that is sparse already is where stage III goes on."""
    adapter = stage_settings(recipe, number).adapter
    if adapter and adapter.continue_from:
        return base_of(adapter.continue_from)
    before, model = Path(recipe.output) / f"stage{number - 1}", recipe.model
    if number == 1 or (number == 3 and not before.is_dir() and isinstance(model, str) and isinstance(load_config(model), MoeLlavaConfig)):
        return model
    return str(before)


# Of what a sparse model is, these are in its weights; the rest may change from run to run.
STRUCTURE = ("num_experts", "moe_layers", "use_residual")


def check_start(recipe: Recipe, number: int, path: str | Parts) -> None:
    """Raises CheckpointError, RecipeError or ValueError now if a stage cannot start from `path`, or stage III could not make it sparse."""
    if path == str(Path(recipe.output) / f"stage{number - 1}") and not Path(path).is_dir():
        raise CheckpointError(f"stage {number} starts from {path}, which does not exist: run stage {number - 1} first")
    if isinstance(path, str):
        check_checkpoint(path, plain=True)
        check_weights(path)
    model = start_on_meta(path)
    if not isinstance(model, MoeLlavaForConditionalGeneration):
        on_meta(sparse_config(model.config, recipe.stage3.moe))
        return
    if number != 3:
        raise RecipeError(f"{path} is sparse already: only stage III can go on from it (--stage 3)")
    if recipe.stage3.dense:
        raise RecipeError(f"{path} is sparse already, but stage3.dense asks for the dense control, which starts from a dense LLaVA")
    if recipe.stage3.expert_start != "copy":
        raise RecipeError(
            f"{path} is sparse already, but stage3.expert_start is {recipe.stage3.expert_start}, which is for experts that are made here"
        )
    wanted = MoeLlavaConfig(**model.config.to_dict() | dataclasses.asdict(recipe.stage3.moe))
    for name in STRUCTURE:
        attribute = "moe_layer_indices" if name == "moe_layers" else name
        has, asked = getattr(model.config, attribute), getattr(wanted, attribute)
        if has != asked:
            raise RecipeError(f"{path} has {name} {has}, but stage3.moe.{name} says {asked}, and its weights cannot change that")


def structure(recipe: Recipe, number: int, path: str | Parts) -> LlavaForConditionalGeneration:
    """What a stage starts with, without weights, if `path` is where it comes from, or where an earlier stage does."""
    model = start_on_meta(path)
    if number != 3 or isinstance(model, MoeLlavaForConditionalGeneration):
        return model
    return on_meta(sparse_config(model.config, recipe.stage3.moe))


def start_processor(path: str | Parts) -> Any:
    """The processor of what a stage starts from. Raises CheckpointError if there is none."""
    return joined_processor(**dataclasses.asdict(path)) if isinstance(path, Parts) else load_processor(path)


def set_aspect_ratio(processor: Any, settings: Stage) -> None:
    """Makes the processor pad images to a square, or not, if the stage says so. Raises RecipeError if it cannot pad."""
    if settings.image_aspect_ratio is None:
        return
    images = processor.image_processor
    if not hasattr(images, "pad_to_square"):
        raise RecipeError(
            f"image_aspect_ratio is {settings.image_aspect_ratio}, but the model's {type(images).__name__} cannot pad to a square"
        )
    images.do_pad = settings.image_aspect_ratio == "pad"


def start(recipe: Recipe, number: int, name: str) -> tuple[LlavaForConditionalGeneration, Any]:
    """(model, processor) as the stage starts with them."""
    settings = stage_settings(recipe, number)
    chosen = start_frozen if settings.adapter else start_sharded if recipe.sharding else start_model
    model, processor = chosen(recipe, number, name)
    set_aspect_ratio(processor, settings)
    return model, processor


def start_model(recipe: Recipe, number: int, name: str) -> tuple[LlavaForConditionalGeneration, Any]:
    """(model, processor) as the stage starts with them: in float32, sparse in stage III."""
    path = origin(recipe, number)
    if isinstance(path, Parts):
        return join(**dataclasses.asdict(path), seed=recipe.seed, attn_implementation=recipe.attention)
    model, processor = load_checkpoint(path, **_load_settings(recipe, path))
    if name == "stage3" and not isinstance(model, MoeLlavaForConditionalGeneration):
        settings = {**dataclasses.asdict(recipe.stage3.moe), "expert_start": recipe.stage3.expert_start, "seed": recipe.seed}
        return upcycle(model, **settings), MoeLlavaProcessor.from_llava(processor)
    return model, processor


def start_sharded(recipe: Recipe, number: int, name: str) -> tuple[LlavaForConditionalGeneration, Any]:
    """As `start_model`, but of the model only this process's part. Parts are loaded from a folder, so a model that is made first, joined or
    sparse, is written to one."""
    path = origin(recipe, number)
    if isinstance(path, str) and (name != "stage3" or isinstance(load_config(path), MoeLlavaConfig)):
        return load_sharded(recipe, path, **_load_settings(recipe, path))
    with shared_folder(Path(recipe.output) / f".{name}-start", lambda: start_model(recipe, number, name)) as folder:
        return load_sharded(recipe, folder, **_load_settings(recipe, folder))


def start_frozen(recipe: Recipe, number: int, name: str) -> tuple[LlavaForConditionalGeneration, Any]:
    """(model, processor) as a stage with an adapter starts with them: in float32 but for what is quantised."""
    work = work_folder(Path(recipe.output) / name)
    base = base_of_stage(recipe, number, name, work)
    with PartialState().main_process_first():
        if base == str(work / "base") and not Path(base).is_dir():
            model, processor = start_model(recipe, number, name)
            write_recipe(recipe, work)  # a run that is resumed takes the base as it is, so its settings must be known
            with saving(work, "the base of the adapter"), new_folder(Path(base)) as folder:
                model.save_pretrained(folder)
                processor.save_pretrained(folder)
                write_manifest(folder, folder.glob("*.safetensors"))
    adapter = stage_settings(recipe, number).adapter
    assert adapter is not None
    return load_base(base, adapter, torch.bfloat16 if use_bf16(recipe.precision) else torch.float32, recipe.attention)


def base_of_stage(recipe: Recipe, number: int, name: str, folder: Path) -> str:
    """The checkpoint that a stage's adapter belongs to: the one that the stage starts from, or, where that has to become sparse or to take
    other settings, the one that `start_frozen` writes into the stage's `folder`."""
    path = origin(recipe, number)
    assert isinstance(path, str), "stage I, which alone starts from parts, has no adapter"
    config = load_config(path)
    moe = {key: value for key, value in dataclasses.asdict(recipe.stage3.moe).items() if key not in STRUCTURE}
    if name != "stage3" or (isinstance(config, MoeLlavaConfig) and all(getattr(config, key) == value for key, value in moe.items())):
        return path
    return str(folder / "base")


def _load_settings(recipe: Recipe, path: str) -> dict[str, Any]:
    """How a checkpoint is loaded for training; a sparse one with the recipe's settings, but for those that are in its weights."""
    settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": recipe.attention}
    if isinstance(load_config(path), MoeLlavaConfig):
        settings |= {name: value for name, value in dataclasses.asdict(recipe.stage3.moe).items() if name not in STRUCTURE}
    return settings


def moe_layers_of(recipe: Recipe, model: LlavaForConditionalGeneration) -> list[int]:
    """The layers that are, or would be, sparse."""
    if isinstance(model, MoeLlavaForConditionalGeneration):
        return model.config.moe_layer_indices
    return sparse_config(model.config, recipe.stage3.moe).moe_layer_indices


def use_bf16(precision: str) -> bool:
    """ "auto": on a GPU that has bfloat16, and on a CPU with instructions for it; elsewhere bfloat16 is slower than float32."""
    if precision == "auto":
        if torch.cuda.is_available():
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cpu._is_avx512_bf16_supported()
    return precision == "bf16"


def write_recipe(recipe: Recipe, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    write_whole(work / "recipe.yaml", yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))
