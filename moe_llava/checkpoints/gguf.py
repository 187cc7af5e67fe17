"""Language models in a GGUF file, the format of llama.cpp: transformers reads them, dequantised, and a folder keeps the result.

Unusual here: a file is converted once, into the cache of the hub's files. transformers parses a file in Python, which takes a minute or
two, and would do so for its configuration, its tokenizer and its weights in every process.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_llava.common.errors import CheckpointError
from moe_llava.common.files import file_digest, new_folder
from moe_llava.common.messages import first_line

SUFFIX = ".gguf"


def language_folder(name: str) -> str:
    """Return the folder or hub id of a language model: `name` itself, or the folder that a GGUF file was converted to.

    Raises CheckpointError if transformers cannot read the file.
    """
    return _converted(Path(name)) if name.endswith(SUFFIX) else name


@cache
def _converted(file: Path) -> str:
    if not file.is_file():
        raise CheckpointError(f"the language model {file} does not exist")
    folder = Path(constants.HF_HOME) / "moe-llava" / f"{file.stem}-{file_digest(file)[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # processes of a distributed run start together
        if not folder.is_dir():
            model, tokenizer = _read(file)
            with new_folder(folder) as partial:
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
    return str(folder)


def _read(file: Path) -> tuple[Any, Any]:
    """Return (model with weights in float32, tokenizer). Raises CheckpointError if a weight is missing or has no place."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
    except ImportError as error:
        raise CheckpointError(f"{file} needs gguf, which is not installed: pip install -e '.[gguf]'") from error
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"transformers cannot read {file}: {first_line(error)}") from error
    problems = [f"{kind.removesuffix('_keys')} {key}" for kind, keys in report.items() if kind.endswith("_keys") for key in keys]
    if problems:
        raise CheckpointError(f"{file} does not hold the weights of a {type(model).__name__}: {', '.join(problems[:5])}")
    model.hf_quantizer = None  # the weights are plain now
    del model.config.quantization_config
    return model, tokenizer
