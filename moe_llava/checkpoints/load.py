"""Loads a dense or sparse LLaVA folder with its processor, and says clearly what is wrong with a folder that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel

from moe_llava.checkpoints.errors import CheckpointError
from moe_llava.model import MoeLlavaConfig

MODEL_TYPES = ("llava", MoeLlavaConfig.model_type)


def check_checkpoint(path: str | Path) -> None:
    """Raises CheckpointError unless `path` is a hub id or a folder with the configuration of a dense or sparse LLaVA."""
    folder = Path(path)
    if not folder.exists() and len(folder.parts) == 2 and not folder.is_absolute():
        return  # may be owner/name on the hub
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {path} is not a folder")
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{path} is no checkpoint: it has no config.json")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{config} is not JSON: {error}") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"{config} has model_type {model_type!r}, but must have one of {', '.join(MODEL_TYPES)}")


def load_checkpoint(path: str | Path, dtype: torch.dtype | str = "auto", **settings: Any) -> tuple[LlavaForConditionalGeneration, Any]:
    """(model in evaluation mode, processor) from a folder or hub id; `settings` go to `from_pretrained`.

    Raises CheckpointError as `check_checkpoint` does.
    """
    check_checkpoint(path)
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **settings)
        return model, AutoProcessor.from_pretrained(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {str(error).splitlines()[0]}") from error


def best_device() -> torch.device:
    """The accelerator, if there is one."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def load_on_meta(path: str | Path) -> PreTrainedModel:
    """The model of a checkpoint without its weights: its structure, in no memory.

    Raises CheckpointError as `check_checkpoint` does.
    """
    check_checkpoint(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)
