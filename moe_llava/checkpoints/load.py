"""Loads a dense or sparse LLaVA folder with its processor, and says clearly what is wrong with a folder that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from moe_llava.checkpoints.errors import CheckpointError, first_line
from moe_llava.checkpoints.files import check_checkpoint
from moe_llava.checkpoints.processors import with_portable_template


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
    """The processor of a folder or hub id, with a chat template that takes strings and lists of parts alike.

    Raises CheckpointError as `check_checkpoint` does, or if there is none.
    """
    check_checkpoint(path)
    if Path(path).is_dir() and not (Path(path) / "tokenizer_config.json").is_file():
        raise CheckpointError(f"checkpoint {path} has no tokenizer: put its files beside the published weights, and convert again")
    try:
        return with_portable_template(AutoProcessor.from_pretrained(path))
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
