"""What a checkpoint's JSON files say. Needs neither torch nor transformers: so a command tells at once that its checkpoint is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub

from moe_llava._registration import MODEL_TYPE
from moe_llava.checkpoints.errors import CheckpointError
from moe_llava.checkpoints.families import published_family

MODEL_TYPES = ("llava", MODEL_TYPE)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def check_checkpoint(path: str | Path, keep_experts: float | None = None) -> None:
    """Raises CheckpointError unless `path` is a folder or hub id with the configuration of a dense or sparse LLaVA; with `keep_experts`,
    unless it is sparse and that a share of its experts, above 0 and at most 1."""
    model_type = read_config(path).get("model_type")
    if published_family(model_type):
        raise CheckpointError(f"{path} is a checkpoint of the original code ({model_type}): make one of ours with `moe-llava convert`")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"the config.json of {path} has model_type {model_type!r}, but must have one of {', '.join(MODEL_TYPES)}")
    if keep_experts is None:
        return
    if model_type != MODEL_TYPE:
        raise CheckpointError(f"{path} is dense: it has no experts of which to keep a share")
    check_share("the share of experts to keep", keep_experts)


def is_text_model(path: str | Path) -> bool:
    """Whether a folder or hub id is a language model without a vision tower, or a folder with a tokenizer alone."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return any((folder / name).is_file() for name in TOKENIZER_FILES)
    content = read_config(path)
    model_type = content.get("model_type")
    return not (model_type in MODEL_TYPES or published_family(model_type) or "vision_config" in content)


def check_share(name: str, share: float) -> None:
    """Raises CheckpointError unless it is above 0 and at most 1."""
    if not 0 < share <= 1:
        raise CheckpointError(f"{name} is {share:g}, but must be above 0 and at most 1")


def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a folder or hub id. Raises CheckpointError if there is none."""
    folder = Path(path)
    if folder.is_dir():
        return read_json(folder / "config.json")
    if folder.exists() or len(folder.parts) != 2 or folder.is_absolute():
        raise CheckpointError(f"checkpoint {path} is not a folder")
    try:
        return read_json(Path(huggingface_hub.hf_hub_download(str(path), "config.json")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be loaded: it is no folder, and the hub did not give it") from error


def read_json(file: Path) -> dict[str, Any]:
    """Raises CheckpointError if `file` is missing or holds no JSON object."""
    if not file.is_file():
        raise CheckpointError(f"{file.parent} has no {file.name}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, but holds a {type(content).__name__}")
    return content
