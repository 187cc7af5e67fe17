"""Read and check a checkpoint's JSON files. This needs neither torch nor transformers, so a command refuses a wrong folder at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from moe_llava.checkpoints.families import FAMILIES, Family, published_family
from moe_llava.common.errors import CheckpointError
from moe_llava.common.messages import did_you_mean, first_line

SPARSE = "moe_"  # the model type of a sparse model is that of the dense one after this prefix
EXPORT_FIELD = "moe_llava"  # of the config.json of an export: what it was made from
ADAPTER_CONFIG = "adapter_config.json"
EXAMPLES = "examples.json"  # questions that a model was often trained on, to show to people
PROJECTOR_FILE = "mm_projector.bin"  # the result of stage I of the original code
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
DTYPES = ("auto", "float32", "bfloat16", "float16")  # to load weights in; auto: as they are stored
_POINTER = b"version https://git-lfs.github.com/spec/"
_SETTINGS, _WEIGHTS = ["*.json", "*.tiktoken", "*.model", "*.txt"], ["*.safetensors", "*.bin"]


def check_checkpoint(path: str | Path, keep_experts: float | None = None, plain: bool = False) -> None:
    """Raise CheckpointError unless `path` is a folder or hub id with the configuration of a vision-language model, dense or sparse.

    With `keep_experts`, the model must be sparse, and the number a share above 0 and at most 1. With it or `plain`, the weights must not be
    quantised.
    """
    content = read_config(path)
    model_type = content.get("model_type")
    check_no_other_llava(content, path)
    if published_family(model_type):
        raise CheckpointError(f"{path} is a checkpoint of the original code ({model_type}): convert it with `moe-llava convert`")
    if not is_known(model_type):
        similar = "" if _has_model(model_type) else did_you_mean(str(model_type), known_types(), "")
        rule = f"which is no vision-language model of the installed transformers{similar}"
        raise CheckpointError(f"the config.json of {path} has model_type {model_type!r}, {rule}")
    check_quantisation(content, path)
    if (plain or keep_experts is not None) and quantisation_method(content):
        raise CheckpointError(f"the weights of {path} are quantised, but must be plain here: use the model before quantisation")
    if keep_experts is not None:
        if not str(model_type).startswith(SPARSE):
            raise CheckpointError(f"{path} has no experts made by upcycle, of which to keep a share")
        check_share("the share of experts to keep", keep_experts)


def check_dtype(dtype: str, keep_experts: float | None = None) -> None:
    """Raise ValueError unless weights can be loaded in `dtype`. With `keep_experts`, experts are read as they are stored."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
    if dtype != "auto" and keep_experts is not None:
        raise ValueError("--dtype and --keep-experts do not go together: experts are read from the files as they are stored")


def is_known(model_type: Any) -> bool:
    """Return whether a model type is that of a dense or sparse vision-language model."""
    return isinstance(model_type, str) and model_type.removeprefix(SPARSE) in known_types()


@cache
def known_types() -> tuple[str, ...]:
    """Return the model types of AutoModelForImageTextToText. The table is read from transformers' source, whose import takes seconds."""
    table = _models() / "auto" / "modeling_auto.py"
    _, _, names = table.read_text(encoding="utf-8").partition("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = OrderedDict(")
    return tuple(re.findall(r'\("([^"]+)",', names.partition("\n)")[0]))


def _has_model(model_type: Any) -> bool:
    """Return whether transformers has a model of this type at all, such as a language model."""
    return isinstance(model_type, str) and (_models() / model_type.replace("-", "_") / "__init__.py").is_file()


def _models() -> Path:
    spec: Any = find_spec("transformers")
    return Path(spec.origin).parent / "models"


def check_published(settings: dict[str, Any], file: Path, path: str | Path) -> tuple[Family, bool]:
    """Return (family, whether it is sparse) of a config.json. Raises CheckpointError if it is not that of a published checkpoint."""
    check_no_other_llava(settings, path)
    check_quantisation(settings, path)
    model_type = settings.get("model_type")
    found = published_family(model_type)
    if model_type == f"{SPARSE}llava" or (model_type == "llava" and "vision_config" in settings):
        raise CheckpointError(f"{path} is no published checkpoint: it loads as it is")
    if found is None:
        known = ", ".join(f"[moe_]llava_{name}" for name in FAMILIES)
        raise CheckpointError(f"{file} has model_type {model_type!r}, but a published checkpoint has one of {known}")
    if found[1] and not isinstance(settings.get("moe"), dict):
        raise CheckpointError(f"{file} has model_type {model_type!r}, but no settings `moe`, which describe the experts")
    name = settings.get("mm_image_tower")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{file} has mm_image_tower {name!r}, but must name the vision tower")
    return found


def check_no_adapter(folder: Path) -> None:
    """Raise CheckpointError if `folder` holds an adapter (LoRA) instead of a model."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    if (folder / "non_lora_trainables.bin").is_file():
        raise CheckpointError(
            f"{folder} is a LoRA adapter of the original code: merge it into its base there (merge_lora_weights.py), "
            "and then use `moe-llava convert`"
        )
    raise CheckpointError(f"{folder} is an adapter, not a whole model: add it to its base with `moe-llava merge`")


def check_no_other_llava(content: dict[str, Any], path: str | Path) -> None:
    """Raise CheckpointError if a config.json is that of the original LLaVA code, whose layout is neither MoE-LLaVA's nor transformers'."""
    if "mm_vision_tower" in content and "mm_image_tower" not in content and "vision_config" not in content:
        raise CheckpointError(
            f"the config.json of {path} names its tower as mm_vision_tower, as the original LLaVA code does: this layout is not supported. "
            "Convert it with transformers' convert_llava_weights_to_hf.py, or take a checkpoint in transformers' layout (llava-hf)"
        )


def check_quantisation(content: dict[str, Any], path: str | Path) -> None:
    """Raise CheckpointError if the weights of a config.json are quantised, except by bitsandbytes if that is installed."""
    method = quantisation_method(content)
    if method not in (None, "bitsandbytes"):
        raise CheckpointError(
            f"the config.json of {path} says that its weights are quantised by {method}: "
            "only plain weights and those of bitsandbytes can be loaded"
        )
    if method and find_spec("bitsandbytes") is None:
        raise CheckpointError(f"the weights of {path} are quantised by bitsandbytes, which is not installed: pip install bitsandbytes")


def quantisation_method(content: dict[str, Any]) -> str | None:
    """Return the method by which the weights of a config.json are quantised; None if they are not."""
    for part in (content, content.get("text_config") or {}):
        settings = part.get("quantization_config") or part.get("compression_config")
        if settings:
            old_bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
            return "bitsandbytes" if old_bitsandbytes else str(settings.get("quant_method"))
    return None


def is_export(path: str | Path) -> bool:
    """Return whether a folder holds an export to a native architecture, from which the sparse model can be restored."""
    return Path(path).is_dir() and (Path(path) / "config.json").is_file() and EXPORT_FIELD in read_config(path)


def is_text_model(path: str | Path) -> bool:
    """Return whether a folder or hub id is a language model without a vision tower, or a folder with a tokenizer alone."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return any((folder / name).is_file() for name in TOKENIZER_FILES)
    content = read_config(path)
    model_type = content.get("model_type")
    return not (is_known(model_type) or published_family(model_type) or "vision_config" in content)


def check_share(name: str, share: float) -> None:
    """Raise CheckpointError unless `share` is above 0 and at most 1."""
    if not 0 < share <= 1:
        raise CheckpointError(f"{name} is {share:g}, but must be above 0 and at most 1")


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the config.json of a folder or hub id. Raises CheckpointError if there is none, or if the folder holds an adapter."""
    folder = Path(path)
    check_no_adapter(folder)
    if folder.is_dir():
        return read_json(folder / "config.json")
    return read_json(hub_file(path, "config.json"))


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """Return the settings of an adapter folder. Raises CheckpointError if it is not one."""
    if (Path(folder) / "non_lora_trainables.bin").is_file():
        check_no_adapter(Path(folder))  # raises, and says what to do with an adapter of the original code
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"adapter {folder} is not a folder with {ADAPTER_CONFIG}")
    return read_json(Path(folder) / ADAPTER_CONFIG)


def resolve(path: str | Path, with_weights: bool) -> Path:
    """Return a folder on this machine. A hub id is downloaded; `path` may also be the file of a projector."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_file() and folder.name == PROJECTOR_FILE:
        return folder.parent
    hub_file(path, "config.json")  # one request, where the download would retry for long
    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=_SETTINGS + _WEIGHTS if with_weights else _SETTINGS))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a folder, and the hub did not provide it: {first_line(error)}") from error


def hub_file(path: str | Path, file: str) -> Path:
    """Return a file of a hub id, from the cache or downloaded.

    Raises CheckpointError if `path` is no hub id, if the hub does not provide the file, or if its cache cannot be used.
    """
    if Path(path).exists() or len(Path(path).parts) != 2 or Path(path).is_absolute():
        raise CheckpointError(f"checkpoint {path} is not a folder")
    name = str(path)
    try:
        if huggingface_hub.try_to_load_from_cache(name, file) is None:
            # One request. The download itself would retry for half a minute if the hub cannot be reached.
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, file), timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return Path(huggingface_hub.hf_hub_download(name, file))
    except Exception as error:  # the errors of the client's HTTP library differ between versions
        if isinstance(error, OSError) and error.filename is not None:
            raise CheckpointError(f"the hub's cache, {constants.HF_HOME} (HF_HOME), cannot be used: {error}") from error
        raise CheckpointError(
            f"checkpoint {name} cannot be loaded: it is no folder, and the hub did not provide it: {first_line(error)}"
        ) from error


def read_examples(path: str | Path) -> list[str]:
    """Return the example questions of a checkpoint, none if it has no file of them. Raises CheckpointError if that is no such file."""
    file = resolve(path, with_weights=False) / EXAMPLES
    if not file.exists():
        return []
    questions = read_json(file).get("questions")
    if not isinstance(questions, list) or not all(isinstance(question, str) for question in questions):
        raise CheckpointError(f"{file} has the questions {questions!r}, but they must be a list of texts")
    return questions


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`. Raises CheckpointError if it is missing or holds none."""
    if not file.is_file():
        raise CheckpointError(f"{file.parent} has no {file.name}")
    check_pointers([file])
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, but holds a {type(content).__name__}")
    return content


def check_pointers(files: Iterable[Path]) -> None:
    """Raise CheckpointError, naming the files, if some of `files` are pointers of Git LFS."""
    pointers = []
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                pointers.append(file)
    if pointers:
        names = ", ".join(file.name for file in pointers)
        raise CheckpointError(
            f"{pointers[0].parent} holds Git LFS pointers instead of files: {names}; fetch the files themselves with `git lfs pull`"
        )
