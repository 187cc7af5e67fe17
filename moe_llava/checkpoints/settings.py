"""Convert a published config.json to transformers' configurations: of the tower, the language model, the whole.

Every function here takes the content of config.json as `settings`, and its path as `file`, for errors.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from moe_llava.checkpoints.families import Family
from moe_llava.checkpoints.files import read_config, read_json
from moe_llava.checkpoints.towers import extra_tokens
from moe_llava.common.errors import CheckpointError
from moe_llava.common.messages import first_line

_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# With a SigLIP tower, which has no class token, "patch" removes the first patch. The published models were trained so.
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_ASPECT_RATIOS = ("pad", "square", None)
# Prefixes of the settings that determine what a language model of the same shapes computes.
_ARITHMETIC = ("num_", "hidden_act", "rope_parameters", "layer_norm_eps", "rms_norm_eps", "sliding_window")
# transformers 5 keeps these settings in `rope_parameters`, and takes them besides the fields of a configuration.
_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def find_tower(name: str, vision_towers: str | Path | None) -> tuple[str, PreTrainedConfig]:
    """Return (folder or hub id, configuration) of a vision tower.

    Raises CheckpointError, naming the places that were searched, if it is not found.
    """
    tower = name
    if vision_towers is not None:
        # The name may be a path on the machine of the training, of which the last parts are the name.
        parts = [part for part in Path(name).parts if part != "/"]
        places = [Path(vision_towers, *parts[start:]) for start in range(len(parts))]
        found = [place for place in places if (place / "config.json").is_file()]
        if not found:
            raise CheckpointError(f"the vision tower {name} is in none of {', '.join(map(str, places))}")
        tower = str(found[0])
    try:
        read_config(tower)
        config = AutoConfig.from_pretrained(tower, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the vision tower {name} cannot be loaded from {tower} (`moe-llava convert` takes a folder of towers: --vision-towers): "
            f"{first_line(error)}"
        ) from error
    config = getattr(config, "vision_config", config)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # it would pool what comes after the layer of the features
    return tower, config


def text_config(family: Family, settings: dict[str, Any], file: Path) -> PreTrainedConfig:
    """Return transformers' configuration of the language model."""
    missing = [name for name in _REQUIRED if name not in settings]
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}")
    for name, value in family.required.items():
        if settings.get(name, value) != value:
            raise CheckpointError(f"{file} has {name} {settings[name]!r}, but only {value!r} is supported")
    text_class = CONFIG_MAPPING[family.config]
    known = {f.name for f in dataclasses.fields(text_class)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
    renamed = {name: settings[stored] for stored, name in family.settings.items() if stored in settings} | settings
    values = {name: value for name, value in renamed.items() if name in known or (name in _ROPE and value is not None)}
    for name in family.halved:
        if values[name] % 2:
            raise CheckpointError(f"{file} has {name} {values[name]}, but it counts two layers of the same width and must be even")
        values[name] //= 2
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    return build_config(text_class, values, file)


def check_language_model(family: Family, settings: dict[str, Any], file: Path, language_file: Path) -> None:
    """Raise CheckpointError if the settings show that a projector was trained with another language model than that of `language_file`."""
    content = read_json(language_file)
    if describes_llava(content):
        raise CheckpointError(f"{language_file} describes a whole LLaVA, not the language model that a projector was trained with")
    trained, given = text_config(family, settings, file), text_config(family, content, language_file)
    for name in trained.to_dict():
        if name.startswith(_ARITHMETIC) and getattr(trained, name) != getattr(given, name):
            raise CheckpointError(
                f"{language_file} has {name} {getattr(given, name)}, but {file} was trained with {getattr(trained, name)}: "
                "they do not belong together"
            )


def describes_llava(content: dict[str, Any]) -> bool:
    """Return whether a config.json, published or of transformers, is that of a model with a vision tower."""
    return "mm_image_tower" in content or "vision_config" in content


def llava_settings(settings: dict[str, Any], vision_config: PreTrainedConfig, file: Path) -> dict[str, Any]:
    """Return the settings of a LlavaConfig about the projector and the features."""
    projector, feature = settings.get("image_projector_type"), settings.get("mm_vision_select_feature", "patch")
    if projector != "mlp2x_gelu":
        raise CheckpointError(f"{file} has image_projector_type {projector!r}, but must have 'mlp2x_gelu': two layers with GELU between")
    if settings.get("image_aspect_ratio") not in _ASPECT_RATIOS:
        raise CheckpointError(f"{file} has image_aspect_ratio {settings['image_aspect_ratio']!r}, but must have one of {_ASPECT_RATIOS}")
    layer = settings.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int) or not -vision_config.num_hidden_layers - 1 <= layer <= vision_config.num_hidden_layers:
        raise CheckpointError(f"{file} has mm_vision_select_layer {layer!r}, but its tower has {vision_config.num_hidden_layers} layers")
    if feature not in _STRATEGIES:
        raise CheckpointError(f"{file} has mm_vision_select_feature {feature!r}, but must have one of {', '.join(_STRATEGIES)}")
    strategy, patches = _STRATEGIES[feature], (vision_config.image_size // vision_config.patch_size) ** 2
    return {
        "projector_hidden_act": "gelu",
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "image_seq_length": patches + extra_tokens(vision_config) - (strategy == "default"),
        "tie_word_embeddings": settings.get("tie_word_embeddings", False),
    }


def no_tokens(config: PreTrainedConfig, vocab_size: int) -> list[int] | None:
    """Return the rows that must never be generated, None if there are none: the placeholder's, and those that were added to a full
    vocabulary of `vocab_size`."""
    rows = set(range(vocab_size, config.text_config.vocab_size)) | {config.image_token_id}
    return sorted(row for row in rows if row < config.text_config.vocab_size) or None


def moe_settings(moe: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the settings of a MoeLlavaConfig about experts and routers."""
    missing = [f"moe.{name}" for name in ("num_experts", "top_k_experts", "moe_layers_idx") if moe.get(name) in (None, [])]
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}")
    numbers, top_k = moe["num_experts"] if isinstance(moe["num_experts"], list) else [moe["num_experts"]], moe["top_k_experts"]
    if not all(isinstance(number, int) for number in [*numbers, top_k]):
        raise CheckpointError(f"{file} has moe.num_experts {numbers} and moe.top_k_experts {top_k!r}, which must be integers")
    if len(set(numbers)) != 1:
        raise CheckpointError(f"{file} has moe.num_experts {numbers}, but all layers must have the same number of experts")
    return {
        "num_experts": numbers[0],
        "num_experts_per_tok": top_k,
        "moe_layers": moe["moe_layers_idx"],
        "norm_topk_prob": top_k > 1,  # the original divides two weights by their sum, and leaves a single one unchanged
        "router_aux_loss_coef": moe.get("router_aux_loss_coef", 0.01),
        "use_residual": moe.get("use_residual", False),
    }


def build_config(config_class: type[PreTrainedConfig], values: dict[str, Any], file: Path) -> Any:
    """Return a configuration. Raises CheckpointError if the class refuses the values."""
    try:
        return config_class(**values)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{file} defines no {config_class.__name__}: {error}") from error
