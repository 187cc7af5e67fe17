"""Loads a dense or sparse LLaVA folder with its processor, and says clearly what is wrong with a folder that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from moe_llava.checkpoints.errors import CheckpointError
from moe_llava.checkpoints.families import published_family
from moe_llava.checkpoints.weights import read_json
from moe_llava.model import MoeLlavaConfig

MODEL_TYPES = ("llava", MoeLlavaConfig.model_type)


def check_checkpoint(path: str | Path) -> None:
    """Raises CheckpointError unless `path` is a hub id or a folder with the configuration of a dense or sparse LLaVA."""
    folder = Path(path)
    if not folder.exists() and len(folder.parts) == 2 and not folder.is_absolute():
        return  # may be owner/name on the hub
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {path} is not a folder")
    model_type = read_json(folder / "config.json").get("model_type")
    if published_family(model_type):
        raise CheckpointError(f"{path} is a checkpoint of the original code ({model_type}): make one of ours with `moe-llava convert`")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"{folder / 'config.json'} has model_type {model_type!r}, but must have one of {', '.join(MODEL_TYPES)}")


def load_checkpoint(path: str | Path, dtype: torch.dtype | str = "auto", **settings: Any) -> tuple[LlavaForConditionalGeneration, Any]:
    """(model in evaluation mode, processor) from a folder or hub id; `settings` go to `from_pretrained`, fields of the configuration
    among them.

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
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_config(path: str | Path) -> LlavaConfig:
    """The configuration of a folder or hub id. Raises CheckpointError as `check_checkpoint` does."""
    check_checkpoint(path)
    try:
        return AutoConfig.from_pretrained(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_on_meta(path: str | Path) -> LlavaForConditionalGeneration:
    """The model of a checkpoint without its weights: its structure, in no memory.

    Raises CheckpointError as `check_checkpoint` does.
    """
    config = load_config(path)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)
