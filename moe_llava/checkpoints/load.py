"""Load the folder of a vision-language model, dense or sparse, with its processor, or report what is wrong with the folder.

Unusual here: before a folder is loaded, its weights are loaded without their data. This costs no memory, and compares every name and shape,
also of layers that are quantised or sharded, which the load itself does not compare. So random weights are never used silently.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import load_state_dict
from transformers.utils import GENERATION_CONFIG_NAME

from moe_llava.checkpoints.families import UNUSED
from moe_llava.checkpoints.files import check_checkpoint, check_pointers, quantisation_method, read_json, resolve
from moe_llava.checkpoints.processors import complete_processor
from moe_llava.checkpoints.separate import check_widths, restore_scales, separated
from moe_llava.checkpoints.tokenization import stated_tokens
from moe_llava.checkpoints.weights import StoredTensor, find_weights, read_tables
from moe_llava.common.errors import CheckpointError
from moe_llava.common.messages import first_line, listed
from moe_llava.model.backbone import FRESH

# Settings of `from_pretrained` that change neither the names nor the shapes of weights.
_PLACEMENT = ("dtype", "device_map", "quantization_config", "distributed_config")
_REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def load_checkpoint(path: str | Path, dtype: torch.dtype | str = "auto", **settings: Any) -> tuple[PreTrainedModel, Any]:
    """Return (model in evaluation mode, processor) of a folder or hub id.

    Raises CheckpointError as `load_model` and `load_processor` do.
    """
    processor = load_processor(path)
    return load_model(path, dtype, **settings), processor


def load_model(path: str | Path, dtype: torch.dtype | str = "auto", **settings: Any) -> PreTrainedModel:
    """Return the model of a folder or hub id, in evaluation mode; `settings` go to `from_pretrained`, fields of the configuration among
    them.

    Raises CheckpointError as `check_checkpoint` and `load_strictly` do.
    """
    model_class, config, others = _parts_of(path, settings)
    if getattr(config, "separate_experts", False):
        path = resolve(path, with_weights=True)
    fresh = _new_buffers(load_config(path), config) if settings.keys() & {"routing", "router_bias_rate"} else ()
    return load_strictly(model_class, path, config, f"checkpoint {path}", fresh, dtype=dtype, **others)


def _new_buffers(stored: Any, wanted: Any) -> tuple[str, ...]:
    """Return parts of the names of the buffers that a checkpoint gets only now, by other options: they start at zero."""
    statistics, bias = FRESH
    new = {
        statistics: wanted.routing == "smoes" and stored.routing != "smoes",
        bias: not stored.router_bias_rate and wanted.router_bias_rate,
    }
    return tuple(part for part, found in new.items() if found)


def check_weights(path: str | Path) -> None:
    """Raise CheckpointError as `load_model` would for a folder's weights, without reading them."""
    model_class, config, _ = _parts_of(path, {})
    if Path(path).is_dir():
        _check_without_data(model_class, Path(path), config, f"checkpoint {path}", {})


def _parts_of(path: str | Path, settings: dict[str, Any]) -> tuple[Any, PreTrainedConfig, dict[str, Any]]:
    """Return (class, configuration, the settings that are no fields of it) of a folder or hub id."""
    fields = {key: value for key, value in settings.items() if key not in _PLACEMENT}
    config, others = _read_config(path, return_unused_kwargs=True, **fields)
    generation = Path(path) / "generation_config.json"
    if generation.is_file():
        read_json(generation)  # transformers ignores one that it cannot read, and answers would have no end
    return (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)],
        config,
        others | {key: settings[key] for key in settings if key in _PLACEMENT},
    )


def load_config(path: str | Path) -> PreTrainedConfig:
    """Return the configuration of a folder or hub id. Raises CheckpointError as `check_checkpoint` does."""
    return _read_config(path)


def _read_config(path: str | Path, **settings: Any) -> Any:
    check_checkpoint(path)
    try:
        return AutoConfig.from_pretrained(path, **settings)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {first_line(error)}") from error
    except (ValueError, StrictDataclassError) as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else None  # its own message begins with the name of a check
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {first_line(cause or error)} (in its config.json)") from error


def load_strictly(model_class: Any, path: str | Path, config: Any, name: str, fresh: tuple[str, ...] = (), **settings: Any) -> Any:
    """Return a model of `model_class`, with `config`, in evaluation mode, with all its weights from a folder or hub id.

    Args:
        name: that of the checkpoint, for errors.
        fresh: parts of the names of weights that need not be stored.
        settings: for `from_pretrained`.

    Raises CheckpointError, listing names and shapes, if a weight is missing, unexpected or misshapen, if a file is missing or damaged, and
    as `check_widths` does.
    """
    try:
        if Path(path).is_dir():
            others = {key: settings[key] for key in settings.keys() - set(_PLACEMENT)}
            _check_without_data(model_class, Path(path), config, name, others, fresh)
        model, report = _from_pretrained(model_class, path, config, settings)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{name} cannot be loaded: {first_line(error)}") from error
    check_report(model, report, name, {}, fresh)
    if "distributed_config" not in settings:
        _check_tied(model, name)
    if getattr(model.config, "quantization_config", None):
        check_widths(model, name)
        model.register_state_dict_pre_hook(restore_scales)
    return model


def _from_pretrained(model_class: Any, path: str | Path, config: Any, settings: dict[str, Any]) -> Any:
    """Return (model, report). Where the configuration has separate experts, stacks in the files are separated."""
    if not getattr(config, "separate_experts", False):
        return model_class.from_pretrained(path, config=config, **_REPORT, **settings)
    stored: dict[str, torch.Tensor] = {}
    for file in find_weights(Path(path)):
        stored |= load_state_dict(str(file))  # maps the file, and reads nothing
    if (Path(path) / GENERATION_CONFIG_NAME).is_file():
        settings = settings | {"generation_config": GenerationConfig.from_pretrained(path)}
    model, report = model_class.from_pretrained(None, config=config, state_dict=separated(stored), **_REPORT, **settings)
    model.config.name_or_path = model.name_or_path = str(path)
    return model, report


def _check_without_data(
    model_class: Any, folder: Path, config: Any, name: str, settings: dict[str, Any], fresh: tuple[str, ...] = ()
) -> None:
    """Raise CheckpointError unless the weights in `folder` are those of the model. Quantised weights have other shapes, so of these only
    the missing ones are found."""
    try:
        tables = read_tables(find_weights(folder))
    except CheckpointError as error:
        raise CheckpointError(f"{name} cannot be loaded: {error}") from error
    stored = {key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in tables.items()}
    if getattr(config, "separate_experts", False):
        stored = separated(stored)
    packed, config = quantisation_method(config.to_dict()) is not None, copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    model, report = model_class.from_pretrained(None, config=config, state_dict=stored, device_map="meta", **_REPORT, **settings)
    if packed:
        report |= {"missing_keys": report["missing_keys"] | _missing_scales(tables), "unexpected_keys": set(), "mismatched_keys": set()}
    elif whole := sorted(key for key, tensor in tables.items() if key in model.state_dict() and not tensor.dtype.is_floating_point):
        problems = [f"{key} is stored as {str(tables[key].dtype).removeprefix('torch.')}" for key in whole]
        raise CheckpointError(f"{name} has weights that are not floating point, and no quantization_config:\n  {listed(problems)}")
    check_report(model, report, name, stored, fresh)


def _missing_scales(tables: dict[str, StoredTensor]) -> set[str]:
    """Return the names of the scales that bitsandbytes stores beside quantised weights and that `tables` lacks."""
    four_bits = {f"{key}.absmax" for key, tensor in tables.items() if key.endswith(".weight") and tensor.dtype == torch.uint8}
    eight_bits = {f"{key.removesuffix('weight')}SCB" for key, tensor in tables.items() if tensor.dtype == torch.int8}
    return (four_bits | eight_bits) - tables.keys()


def check_report(model: Any, report: dict[str, Any], name: str, stored: dict[str, torch.Tensor], fresh: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError unless every weight of `model` that is not `fresh` came from the checkpoint `name`, and every weight of the
    checkpoint was used. `report`: from loading with `output_loading_info`. `stored`: stored tensors, for their shapes."""
    missing = sorted(key for key in report["missing_keys"] if not any(part in key for part in fresh))
    unexpected = [key for key in report["unexpected_keys"] if not any(pattern.fullmatch(key) for pattern in UNUSED.values())]
    if not (missing or unexpected or report["mismatched_keys"]):
        return
    wanted = model.state_dict()
    problems = [f"missing: {key}" + (f" {list(wanted[key].shape)}" if key in wanted else "") for key in missing]
    problems += [f"unexpected: {key}" + (f" {list(stored[key].shape)}" if key in stored else "") for key in sorted(unexpected)]
    problems += [
        f"misshapen: {key} is {list(found)}, but the configuration asks for {list(shape)}"
        for key, found, shape in sorted(report["mismatched_keys"])
    ]
    raise CheckpointError(f"{name} does not hold the weights that its config.json describes:\n  {listed(problems)}")


def _check_tied(model: Any, name: str) -> None:
    """Raise CheckpointError if the configuration ties the head to the embedding table, but the checkpoint holds two different tables.
    transformers would load both, but a model that is made from this one would lose the second."""
    head = model.get_output_embeddings()
    if head is not None and model.config.tie_word_embeddings and head.weight is not model.get_input_embeddings().weight:
        raise CheckpointError(
            f"the config.json of {name} has tie_word_embeddings true, but the head that is stored differs from the embedding table: "
            "correct the one that is wrong"
        )


def load_processor(path: str | Path) -> Any:
    """Return the processor of a folder or hub id. Settings that an older one lacks are taken from the configuration; it pads on the left,
    as generation requires, and its chat template takes strings and lists of parts alike.

    Raises CheckpointError as `check_checkpoint` does, if there is no processor, or one that does not fit the configuration.
    """
    config = load_config(path)
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "tokenizer_config.json").is_file():
            advice = "save the processor there, too; if it was converted, put the tokenizer's files beside the published weights first"
            raise CheckpointError(f"checkpoint {path} has no tokenizer: {advice}")
        check_pointers(file for file in folder.iterdir() if file.suffix in (".json", ".jinja", ".model", ".txt"))
    try:
        processor = AutoProcessor.from_pretrained(path, **(stated_tokens(folder) if folder.is_dir() else {}))
        complete_processor(processor, config, path)
        return processor
    except (OSError, ValueError, ImportError) as error:  # some need torchvision or another package
        raise CheckpointError(f"the processor of {path} cannot be loaded: {first_line(error)}") from error


def check_origin_tokens(paths: Sequence[str], processor: Any, dense: str) -> None:
    """Raise CheckpointError if a model that gives experts has other tokens than `dense`, whose processor is given: its experts would have
    learnt to read other ids; or as `load_processor` does."""
    vocabulary = processor.tokenizer.get_vocab()
    for path in paths:
        found = load_processor(path).tokenizer.get_vocab()
        check_vocabulary(path, found, dense, vocabulary, vocabulary.keys() | found.keys())


def check_vocabulary(path: str, found: dict[str, int], other: str, vocabulary: dict[str, int], tokens: Iterable[str]) -> None:
    """Raise CheckpointError if one of `tokens` has another id in the vocabulary of `path` than in that of `other`, or none."""
    if differing := sorted(token for token in tokens if vocabulary.get(token) != found.get(token)):
        problems = [f"{token!r} is {found.get(token)}, but {vocabulary.get(token)} in {other}" for token in differing]
        raise CheckpointError(f"{path} has another vocabulary:\n  {listed(problems)}")


def best_device() -> torch.device:
    """Return the accelerator if there is one, otherwise the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_on_meta(path: str | Path) -> PreTrainedModel:
    """Return the model of a checkpoint without its weights, in no memory. Raises CheckpointError as `check_checkpoint` does."""
    config = load_config(path)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)
