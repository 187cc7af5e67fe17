"""Adapters: LoRA, as PEFT implements it, on parts of a frozen language model, which bitsandbytes may quantise.

An adapter is a small folder in PEFT's own format: adapter_config.json, which names its base (a complete checkpoint), and
adapter_model.safetensors with the trained weights. base.json has the digest and the MoE settings of the base that it was trained on.

Unusual here:
- Every name given to PEFT is that of a layer of the language model: a bare `q_proj` would also match the vision tower.
- Stacked experts are named by `target_parameters`. PEFT adds the product of both factors to the weights before they are used, so neither
  dropout nor DoRA can apply to them; the rules of a recipe say so.
- Routers, and the projector in stage II, are small: they are trained in full, as copies that the adapter holds (`modules_to_save`).
- Quantised experts are linear layers, each with LoRA of its own. They are stacked again when the adapter is merged.
- The adapter is merged into the base as it is stored: not quantised, even if the adapter was trained on a quantised one.
"""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import BitsAndBytesConfig, PreTrainedModel

from moe_llava.checkpoints.files import ADAPTER_CONFIG, check_pointers, read_adapter, read_json
from moe_llava.checkpoints.load import load_checkpoint, load_config, load_on_meta
from moe_llava.checkpoints.published import resolve
from moe_llava.checkpoints.separate import keep_unpacked, separate_experts, stack_experts
from moe_llava.checkpoints.weights import find_weights, read_tables, weights_digest
from moe_llava.common.errors import CheckpointError
from moe_llava.common.messages import first_line, listed
from moe_llava.model import Experts, Router, SparseConfig
from moe_llava.training.parsing import require
from moe_llava.training.parts import backbone_name, decoder_layers, moe_layers, projector_modules
from moe_llava.training.recipe import ADAPTER_TARGETS, Adapter, RecipeError
from moe_llava.training.trainable import TRAINABLE, ParameterCount

BASE = "base.json"  # in an adapter's folder: what identifies its base
# Fields of a sparse base's configuration that change its outputs.
MOE = (
    "num_experts",
    "num_experts_per_tok",
    "granularity",
    "num_shared_experts",
    "moe_layer_indices",
    "norm_topk_prob",
    "capacity_factor",
    "use_residual",
    "routing",
)
_OF_EXPERT = re.compile(r"\.mlp\.experts\.\w+\.\d+\.")  # in the names of tensors: LoRA of a single expert's matrix
logger = logging.getLogger(__name__)
UNQUANTISED = ["lm_head", "mlp.coefficient"]  # nor all that is outside the language model, nor stacks


def check_adapter(adapter: Adapter, stage: str, model: PreTrainedModel) -> None:
    """Raise RecipeError if `adapter` does not fit `model`, which `stage` starts from and which is on the meta device, if the adapter to
    continue from has other settings, or if a package is missing."""
    if stage == "dense":
        raise RecipeError("stage3.adapter is set, but the dense baseline trains its FFNs in full: leave the adapter out")
    if adapter.quantisation:
        require("bitsandbytes", f"{stage}.adapter.quantisation")
    if adapter.quantise_experts:
        separate_experts(model)
    wanted = lora_config(model, adapter, stage)
    if adapter.continue_from:
        before = read_adapter(adapter.continue_from)
        names = ("r", "lora_alpha", "lora_dropout", "use_dora", "target_modules", "target_parameters", "modules_to_save")
        changed = [
            f"{name} {before.get(name)}, but the recipe makes it {getattr(wanted, name)}"
            for name in names
            if _plain(before.get(name)) != _plain(getattr(wanted, name))
        ]
        if changed:
            raise RecipeError(f"{stage}.adapter.continue_from is {adapter.continue_from}, which has {'; '.join(changed)}")
        check_base(adapter.continue_from, base_of(adapter.continue_from))


def _plain(value: Any) -> Any:
    """Return a setting in one form: PEFT keeps names as sets or lists, and no names as None or an empty list."""
    return sorted(value) if isinstance(value, (list, set, tuple)) and value else value or None


def base_of(folder: str | Path) -> str:
    """Return the checkpoint that an adapter belongs to. Raises CheckpointError if the folder is no adapter, or names none."""
    base = read_adapter(folder).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"the {ADAPTER_CONFIG} of {folder} has no base_model_name_or_path: name its base checkpoint (--base)")
    return str(base)


def lora_config(model: PreTrainedModel, adapter: Adapter, stage: str) -> Any:
    """Return PEFT's LoraConfig for `adapter` on `model`.

    Raises RecipeError if the model lacks a target, if its experts are quantised, or if PEFT is not installed.
    """
    require("peft", f"{stage}.adapter")
    from peft import LoraConfig

    found = _find_targets(model)
    for target in adapter.targets:
        if not found[target]:
            raise RecipeError(f"{stage}.adapter.targets names {target}, but the language model of this stage has none")
    chosen = {target: sorted(found[target]) if target in adapter.targets else [] for target in ADAPTER_TARGETS}
    stacks = [name for name in chosen["experts"] if name.startswith(_layers(model))]
    linear = [re.escape(name) for name in chosen["attention"] + chosen["FFN"] + chosen["experts"] if name not in stacks]
    whole = projector_modules(model) if "projector" in TRAINABLE[stage] else []
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.use_dora,
        target_modules=rf"{re.escape(_layers(model))}\.\d+\.({'|'.join(linear)})" if linear else [],
        target_parameters=stacks or None,
        modules_to_save=whole + chosen["routers"] or None,
    )


def _layers(model: PreTrainedModel) -> str:
    """Return the name of the list of decoder layers."""
    return f"{backbone_name(model)}.layers"


def _find_targets(model: PreTrainedModel) -> dict[str, set[str]]:
    """Return target -> names of modules: linear layers by name within a decoder layer, stacks of experts and routers by full name."""
    found: dict[str, set[str]] = {target: set() for target in ADAPTER_TARGETS}
    layers = _layers(model)
    for index, layer in enumerate(decoder_layers(model)):
        for name, module in layer.named_modules():
            if isinstance(module, Experts):
                if module.separated:
                    linear = [key for key, part in module.named_modules() if isinstance(part, nn.Linear)]
                    found["experts"] |= {f"{name}.{key}" for key in linear}
                    continue
                if is_parametrized(module) or not all(parameter.is_floating_point() for parameter in module.parameters()):
                    raise RecipeError(f"{layers}.{index}.{name} is quantised: LoRA over them would leave matrices without a gradient")
                matrices = [key for key, value in module.named_parameters(recurse=False) if value.dim() == 3]
                found["experts"] |= {f"{layers}.{index}.{name}.{key}" for key in matrices}
            elif isinstance(module, Router) or name == "mlp.coefficient":
                found["routers"].add(f"{layers}.{index}.{name}")
            elif isinstance(module, nn.Linear) and name.startswith(("self_attn.", "linear_attn.")):
                found["attention"].add(name)
            elif isinstance(module, nn.Linear) and name.startswith("mlp.") and not name.startswith("mlp.experts."):
                found["FFN"].add(name)
    return found


def load_base(base: str, adapter: Adapter, dtype: torch.dtype, attention: str | None) -> tuple[PreTrainedModel, Any]:
    """Return (model, processor) of `base` in float32, with the linear layers of its language model, and its experts, quantised if `adapter`
    says so; those of 4 bits compute in `dtype`. Raises CheckpointError as `load_checkpoint` does."""
    settings: dict[str, Any] = {"separate_experts": True} if adapter.quantise_experts else {}
    if adapter.quantisation:
        settings["quantization_config"] = quantisation_config(base, adapter.quantisation, dtype)
    model, processor = load_checkpoint(base, dtype=torch.float32, attn_implementation=attention, **settings)
    keep_unpacked(model)
    return model, processor


def quantisation_config(checkpoint: str | Path, kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the configuration that quantises the linear layers of a checkpoint's language model as it is loaded, and with
    `separate_experts` its experts, too; those of "nf4" compute in `dtype`."""
    model = load_on_meta(checkpoint)
    parent, _, own = backbone_name(model).rpartition(".")
    skipped = UNQUANTISED + [f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children() if name != own]
    if kind == "nf4":
        four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return BitsAndBytesConfig(**four_bits, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)


def quantisation_saves(model: PreTrainedModel, kind: str) -> int:
    """Return how many bytes quantisation saves in the linear layers of `model`, which are in float32. A scale of 4 bytes is kept for every
    64 weights ("nf4") or for every row ("int8")."""
    modules = (named for layer in decoder_layers(model) for named in layer.named_modules())
    weights = [module.weight for name, module in modules if isinstance(module, nn.Linear) and name != "mlp.coefficient"]
    if kind == "nf4":
        return sum(4 * weight.numel() - weight.numel() // 2 - 4 * math.ceil(weight.numel() / 64) for weight in weights)
    return sum(3 * weight.numel() - 4 * weight.shape[0] for weight in weights)


def describe_base(model: PreTrainedModel, adapter: Adapter) -> str:
    """Return a line that says which layers of the frozen model are quantised."""
    if adapter.quantisation is None:
        return "adapter on a base that is not quantised"
    return f"adapter on a base with {describe_quantised(model, adapter.quantisation)}"


def describe_quantised(model: PreTrainedModel, kind: str) -> str:
    """Return a line that says which layers are quantised."""
    experts = sum(module.num_experts for module in model.modules() if isinstance(module, Experts) and module.separated)
    linear = sum(".mlp.experts." not in name for name in quantised_layers(model))
    done = f"{linear} linear layers of the language model" + (f" and {experts} experts" if experts else "")
    rest = "embeddings" if not moe_layers(model) else "routers, embeddings" if experts else "experts, routers, embeddings"
    return f"{done} in {kind}; {rest} and the rest are not"


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a model's weights and buffers, and of the scales of what is quantised."""
    tensors = model.state_dict().values()
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def quantised_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and type(module) is not nn.Linear}


def attach(model: PreTrainedModel, adapter: Adapter, stage: str, base: str | Path) -> tuple[Any, ParameterCount]:
    """Return (PeftModel around `model`, its parameters counted). All of `model` itself is frozen; it was loaded from `base`.

    Raises RecipeError as `lora_config` does.
    """
    from peft import get_peft_model

    config = lora_config(model, adapter, stage)
    total = model.num_parameters()
    if adapter.continue_from:
        adapted = load_adapter(model, adapter.continue_from, str(base), is_trainable=True)
    else:
        adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    trained = {name: parameter.numel() for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    counts: Counter[str] = Counter()
    projector = projector_modules(model)
    for name, number in trained.items():
        counts[_part(name, projector)] += number
    return adapted, ParameterCount(counts, total + sum(number for name, number in trained.items() if ".modules_to_save." not in name))


def cast_frozen(adapted: Any, adapter: Adapter) -> None:
    """Keep in bfloat16 the frozen matrices of the decoder layers that autocast multiplies in bfloat16 anyway. A step computes the same, but
    each of these weights takes 2 bytes, not 4 and 2 more for autocast's copy.

    DoRA computes with norms of the matrices, and LoRA of stacked experts adds to them, so those stay in float32.
    """
    if adapter.use_dora:
        return
    for layer in decoder_layers(without_adapter(adapted)):
        for module in layer.modules():
            stack = _is_stack(module) and "experts" not in adapter.targets
            if (type(module) is nn.Linear or stack) and not any(parameter.requires_grad for parameter in module.parameters()):
                module.to(torch.bfloat16)


def cast_saves(adapted: Any, adapter: Adapter) -> int:
    """Return how many bytes `cast_frozen` has saved. Of a base that will be quantised only stacks count: see `quantisation_saves`."""
    cast = [module for module in adapted.modules() if _is_stack(module)] if adapter.quantisation else [adapted]
    return 2 * sum(parameter.numel() for module in cast for parameter in module.parameters() if parameter.dtype == torch.bfloat16)


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, Experts) and not module.separated


def _part(name: str, projector: list[str]) -> str:
    if any(f".{module}." in name for module in projector):
        return "projector"
    if ".self_attn." in name:
        return "attention adapter"
    if ".mlp.experts." in name:
        return "experts adapter"
    return "routers" if ".modules_to_save." in name else "FFN adapter"


def without_adapter(model: Any) -> Any:
    """Return the model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_adapter(model: PreTrainedModel, folder: str | Path, base: str, is_trainable: bool = False) -> Any:
    """Return a PeftModel: `model`, which was loaded from `base`, with the adapter in `folder`.

    Raises CheckpointError, listing names and shapes, if the adapter's tensors are not those that it has on this base.
    """
    from peft import PeftModel

    stored_tensors(folder)  # a damaged file is named before PEFT reads it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing and misshapen tensors: the check below makes them an error
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, ignore_mismatched_sizes=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"adapter {folder} does not fit {base}: {first_line(error)}") from error
    check_loaded(adapted, folder, base)
    return adapted


def check_loaded(adapted: Any, folder: str | Path, base: str) -> None:
    """Raise CheckpointError unless an adapter folder has exactly the tensors of `adapted`: PEFT would ignore the difference."""
    from peft import get_peft_model_state_dict

    wanted = {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()}
    saved = stored_tensors(folder)
    problems = [f"missing: {name} {wanted[name]}" for name in sorted(wanted.keys() - saved.keys())]
    problems += [f"unexpected: {name} {saved[name]}" for name in sorted(saved.keys() - wanted.keys())]
    problems += [
        f"misshapen: {name} is {saved[name]}, but on this base must be {wanted[name]}"
        for name in sorted(wanted.keys() & saved.keys())
        if wanted[name] != saved[name]
    ]
    if problems:
        raise CheckpointError(f"adapter {folder} does not fit its base {base}:\n  {listed(problems)}")


def stored_tensors(folder: str | Path) -> dict[str, list[int]]:
    """Return the names and shapes of an adapter folder's tensors. Raises CheckpointError if its file is missing or damaged."""
    names = ("adapter_model.safetensors", "adapter_model.bin")
    files = [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
    if not files:
        raise CheckpointError(f"adapter {folder} has no weights; looked for {', '.join(names)}")
    check_pointers(files)
    return {name: list(stored.shape) for name, stored in read_tables(files[:1]).items()}


def describe_weights(base: str | Path) -> dict[str, Any]:
    """Return what identifies a base: the digest of its weights, and its MoE settings."""
    config = load_config(base)
    moe = {name: getattr(config, name) for name in MOE} if isinstance(config, SparseConfig) else {}
    return {"weights": weights_digest(find_weights(resolve(base, with_weights=True))), "moe": moe}


def check_base(folder: str | Path, base: str | Path) -> None:
    """Raise CheckpointError if the adapter in `folder` was trained on another base than `base`; log a warning if it records none."""
    if not (Path(folder) / BASE).is_file():
        logger.warning("adapter %s does not say which weights it was trained on: only names and shapes are compared with %s", folder, base)
        return
    trained, found = read_json(Path(folder) / BASE), describe_weights(base)
    if trained.get("moe") != found["moe"]:
        raise CheckpointError(f"adapter {folder} does not fit {base}, whose MoE settings are {found['moe']}, but were {trained.get('moe')}")
    if trained.get("weights") != found["weights"]:
        raise CheckpointError(
            f"adapter {folder} does not fit {base}: it was trained on other weights (their digest is {found['weights'][:12]}, "
            f"but was {str(trained.get('weights'))[:12]})"
        )


def write_adapter(adapted: Any, folder: Path, base: str, later: str) -> PreTrainedModel:
    """Write the adapter of a PeftModel into `folder`, and return it merged into `base`, in float32. `later`: the path of `base` when the
    stage is finished."""
    adapted.save_pretrained(folder)
    config = read_adapter(folder) | {"base_model_name_or_path": later}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / BASE).write_text(json.dumps(describe_weights(base), indent=2), encoding="utf-8")
    return _merged(folder, base, torch.float32)[0]


def merge(folder: str | Path, base: str | Path | None = None, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """Return (model, processor): the base with an adapter merged into its weights, a model like any other.

    Args:
        folder: the adapter.
        base: its base, if that has moved since the adapter recorded it.
        dtype: "auto" keeps that of the base.

    Raises RecipeError if PEFT is not installed; CheckpointError if there is no adapter or no base, or if they do not fit.
    """
    require("peft", f"adapter {folder}")
    path = str(base or base_of(folder))
    read_adapter(folder)
    check_base(folder, path)
    return _merged(folder, path, dtype)


def _merged(folder: str | Path, base: str, dtype: torch.dtype | str) -> tuple[Any, Any]:
    separate = any(_OF_EXPERT.search(name) for name in stored_tensors(folder))
    model, processor = load_checkpoint(base, dtype=dtype, **({"separate_experts": True} if separate else {}))
    if getattr(model.config, "quantization_config", None):
        raise CheckpointError(f"the weights of {base} are quantised, but an adapter is merged into plain ones: use the unquantised model")
    try:
        merged = load_adapter(model, folder, base).merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"adapter {folder} cannot be merged into {base}: {first_line(error)}") from error
    if separate:
        stack_experts(merged)
    return merged, processor
