"""Loads a dense or sparse LLaVA folder with its processor, and says clearly what is wrong with a folder that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from moe_llava.checkpoints.errors import CheckpointError, first_line
from moe_llava.checkpoints.families import published_family
from moe_llava.checkpoints.weights import read_json
from moe_llava.model import MoeLlavaConfig

MODEL_TYPES = ("llava", MoeLlavaConfig.model_type)


def check_checkpoint(path: str | Path) -> None:
    """Raises CheckpointError unless `path` is a folder or hub id with the configuration of a dense or sparse LLaVA."""
    model_type = read_config(path).get("model_type")
    if published_family(model_type):
        raise CheckpointError(f"{path} is a checkpoint of the original code ({model_type}): make one of ours with `moe-llava convert`")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"the config.json of {path} has model_type {model_type!r}, but must have one of {', '.join(MODEL_TYPES)}")


def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a folder or hub id. Raises CheckpointError if there is none."""
    folder = Path(path)
    if folder.is_dir():
        return read_json(folder / "config.json")
    if folder.exists() or len(folder.parts) != 2 or folder.is_absolute():
        raise CheckpointError(f"checkpoint {path} is not a folder")
    try:
        return read_json(Path(hf_hub_download(str(path), "config.json")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be loaded: it is no folder, and the hub did not give it") from error


def load_checkpoint(path: str | Path, dtype: torch.dtype | str = "auto", **settings: Any) -> tuple[LlavaForConditionalGeneration, Any]:
    """(model in evaluation mode, processor) from a folder or hub id; `settings` go to `from_pretrained`, fields of the configuration
    among them.

    Raises CheckpointError as `check_checkpoint` does.
    """
    processor = load_processor(path)
    try:
        return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **settings), processor
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {first_line(error)}") from error


def load_processor(path: str | Path) -> Any:
    """The processor of a folder or hub id. Raises CheckpointError as `check_checkpoint` does, or if there is none."""
    check_checkpoint(path)
    if Path(path).is_dir() and not (Path(path) / "tokenizer_config.json").is_file():
        raise CheckpointError(f"checkpoint {path} has no tokenizer: put its files beside the published weights, and convert again")
    try:
        return AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the processor of {path} cannot be loaded: {first_line(error)}") from error


def best_device() -> torch.device:
    """The accelerator, if there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_config(path: str | Path) -> LlavaConfig:
    """The configuration of a folder or hub id. Raises CheckpointError as `check_checkpoint` does."""
    check_checkpoint(path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {first_line(error)}") from error


def load_on_meta(path: str | Path) -> LlavaForConditionalGeneration:
    """The model of a checkpoint without its weights: its structure, in no memory.

    Raises CheckpointError as `check_checkpoint` does.
    """
    config = load_config(path)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)
