"""The model and the processor that a stage begins with, or resumes with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from moe_llava.checkpoints.join import join, joined_processor
from moe_llava.checkpoints.load import load_checkpoint, load_model, load_processor
from moe_llava.checkpoints.processors import sparse_processor
from moe_llava.common.files import new_folder
from moe_llava.common.messages import did_you_mean
from moe_llava.model import upcycle
from moe_llava.training.adapters import load_base
from moe_llava.training.native import follow_autocast
from moe_llava.training.parts import is_native
from moe_llava.training.recipe import Parts, RecipeError, StageSettings
from moe_llava.training.saves import saving, write_manifest
from moe_llava.training.sharding import load_sharded, shared_folder
from moe_llava.training.stage import Stage


def start_processor(path: str | Parts) -> Any:
    """Return the processor of a checkpoint, or of one that is joined from parts. Raises CheckpointError if there is none."""
    return joined_processor(**dataclasses.asdict(path)) if isinstance(path, Parts) else load_processor(path)


def prepare_images(processor: Any, settings: StageSettings) -> None:
    """Set how a stage's images and videos are processed. Raises RecipeError for a setting that the model's processor does not have."""
    _set(processor, "image_processor", settings.image_processor)
    _set(processor, "video_processor", settings.video_processor)
    if settings.image_aspect_ratio is None:
        return
    images = processor.image_processor
    if not hasattr(images, "pad_to_square"):
        raise RecipeError(
            f"image_aspect_ratio is {settings.image_aspect_ratio}, but the model's {type(images).__name__} cannot pad to a square"
        )
    images.do_pad = settings.image_aspect_ratio == "pad"


def _set(processor: Any, part: str, settings: dict[str, Any]) -> None:
    """Replace a part of a processor by one with these settings."""
    if not settings:
        return
    old = getattr(processor, part, None)
    if old is None:
        raise RecipeError(f"{part} is {settings}, but the model's {type(processor).__name__} has none")
    known = old.to_dict().keys() | getattr(old.valid_kwargs, "__annotations__", {}).keys()
    for name in settings:
        if name not in known:
            rule = did_you_mean(name, known, f"; it has {', '.join(sorted(known))}")
            raise RecipeError(f"{part}.{name} is no setting of the model's {type(old).__name__}{rule}")
    try:
        setattr(processor, part, type(old)(**old.to_dict() | settings))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{part} is {settings}, which {type(old).__name__} refuses: {error}") from error


def start(stage: Stage, save: Path | None) -> tuple[PreTrainedModel, Any]:
    """Return (model, processor) as the stage begins with them, or, with `save`, as it resumes from that save. The save of an adapter has no
    base: the trainer loads it into the model that the stage begins with."""
    if stage.settings.adapter:
        model, processor = _start_frozen(stage)
    elif save is not None:
        model, processor = _load_save(stage, str(save))
    else:
        model, processor = _start_sharded(stage) if stage.recipe.sharding else _start_whole(stage)
    if is_native(model):
        follow_autocast(model)
    prepare_images(processor, stage.settings)
    return model, processor


def _load_save(stage: Stage, save: str) -> tuple[PreTrainedModel, Any]:
    """Return (model, processor): the model of a save, which has no processor, as this process's shard if the recipe has sharding."""
    path, sharding, settings = stage.origin, stage.recipe.sharding, stage.load_settings(save)
    processor = start_processor(path)
    if stage.upcycles(path):
        processor = sparse_processor(processor)
    return load_sharded(sharding, save, **settings) if sharding else load_model(save, **settings), processor


def _start_whole(stage: Stage) -> tuple[PreTrainedModel, Any]:
    """Return (model, processor): in float32, sparse in stage III."""
    path, recipe = stage.origin, stage.recipe
    if isinstance(path, Parts):
        return join(**dataclasses.asdict(path), seed=recipe.seed, attn_implementation=recipe.attention)
    model, processor = load_checkpoint(path, **stage.load_settings(path))
    if stage.upcycles(path):
        settings = recipe.stage3
        origins = [load_model(name) for name in settings.experts_from]
        model = upcycle(model, settings.options, expert_start=settings.expert_start, experts_from=origins, seed=recipe.seed)
        processor = sparse_processor(processor)
    return model, processor


def _start_sharded(stage: Stage) -> tuple[PreTrainedModel, Any]:
    """Return (model, processor), the model as this process's shard. Shards are loaded from a folder, so a model that has to be joined or
    upcycled first is written to one."""
    path, sharding = stage.origin, stage.recipe.sharding
    assert sharding is not None
    if isinstance(path, str) and not stage.upcycles(path):
        return load_sharded(sharding, path, **stage.load_settings(path)), load_processor(path)
    with shared_folder(stage.final.with_name(f".{stage.name}-start"), lambda: _start_whole(stage)) as folder:
        return load_sharded(sharding, folder, **stage.load_settings(folder)), load_processor(folder)


def _start_frozen(stage: Stage) -> tuple[PreTrainedModel, Any]:
    """Return (model, processor) for an adapter: in float32 but for what is quantised."""
    base, adapter = stage.adapter_base(stage.work), stage.settings.adapter
    assert adapter is not None
    with PartialState().main_process_first():
        if base == str(stage.work / "base") and not Path(base).is_dir():
            model, processor = _start_whole(stage)
            stage.write_recipe()  # a resumed run loads the base as it is, so its settings must be known
            with saving(stage.work, "the base of the adapter"), new_folder(Path(base)) as folder:
                model.save_pretrained(folder)
                processor.save_pretrained(folder)
                write_manifest(folder, folder.glob("*.safetensors"))
    return load_base(base, adapter, torch.bfloat16 if stage.bf16 else torch.float32, stage.recipe.attention)
