"""Loads what the original MoE-LLaVA code published: sparse models, dense ones of stage II, projectors of stage I.

Unusual here:
- Nothing is dropped at inference (`capacity_factor` None), as the published models were meant to be used; the capacity of 1.5 that they
  were trained with is a setting of stage III.
- The tower's weights come from the checkpoint where it holds them. The original code always took the ones that `mm_image_tower` names.
- transformers' dense LLaVA looks every id up in its embedding table, so the placeholder there must be a row: one that no token has.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from moe_llava.checkpoints import layout
from moe_llava.checkpoints.errors import CheckpointError
from moe_llava.checkpoints.families import FAMILIES, Family, published_family
from moe_llava.checkpoints.tokenization import load_tokenizer
from moe_llava.checkpoints.weights import PROJECTOR_FILE, WEIGHT_FILES, find_weights, read_json, read_tables
from moe_llava.data.records import IMAGE_TOKEN
from moe_llava.model import MoeLlavaConfig, MoeLlavaForConditionalGeneration

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# With a SigLIP tower, which has no class token, "patch" takes off the first patch. The published models were trained so.
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_FILES_OF_A_CHECKPOINT = ["*.json", "*.safetensors", "*.bin", "*.tiktoken", "*.model", "*.txt"]
# Settings that transformers 5 keeps in `rope_parameters` and takes apart from a configuration's fields.
_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


@dataclass(frozen=True)
class Published:
    """A checkpoint of the original code, looked at but not loaded.

    `settings`: its config.json. `tower`: folder or hub id of the vision tower that it names. `projector`: of stage I, the file that is all
    it holds. `language_model`: the folder of the language model and its tokenizer; None for a projector that was given none.
    """

    folder: Path
    settings: dict[str, Any]
    family: Family
    config: LlavaConfig
    tower: str
    projector: Path | None
    language_model: Path | None

    @property
    def model_class(self) -> type[LlavaForConditionalGeneration]:
        return MoeLlavaForConditionalGeneration if isinstance(self.config, MoeLlavaConfig) else LlavaForConditionalGeneration

    def on_meta(self) -> LlavaForConditionalGeneration:
        """The model without weights, in no memory."""
        with torch.device("meta"):
            return self.model_class._from_config(self.config)

    def load(self, dtype: torch.dtype | None = None) -> LlavaForConditionalGeneration:
        """Reads the weights. Raises CheckpointError as `load_published` does."""
        if self.projector is not None and self.language_model is None:
            return _load_projector(self, self.projector, dtype)
        return _load_weights(self, self.language_model or self.folder, dtype)


def load_published(
    path: str | Path,
    vision_towers: str | Path | None = None,
    *,
    language_model: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> LlavaForConditionalGeneration:
    """The model of a published checkpoint, in evaluation mode.

    Args:
        path: a folder, or a hub id. A stage I folder holds a projector alone (`mm_projector.bin`, which may itself be the path).
        vision_towers: a folder in which the name in the checkpoint's `mm_image_tower` is looked up; without it, the hub is asked.
        language_model: for a stage I projector, the folder or hub id of the language model that it was trained with. Without it the
            result has tower and projector, and a language model without weights, on the meta device.
        dtype: of the result; None keeps what is stored.

    Returns a MoeLlavaForConditionalGeneration, or a LlavaForConditionalGeneration for stages I and II.

    Raises CheckpointError, naming file and rule, if the checkpoint is damaged, incomplete, of an unknown family, or its tower is not found.
    """
    return look_at(path, vision_towers, language_model).load(dtype)


def look_at(path: str | Path, vision_towers: str | Path | None = None, language_model: str | Path | None = None) -> Published:
    """Reads configurations and tokenizer only. Raises CheckpointError as `load_published` does."""
    folder = _resolve(path)
    has_weights = any((folder / name).is_file() for name in WEIGHT_FILES)
    projector = folder / PROJECTOR_FILE if not has_weights and (folder / PROJECTOR_FILE).is_file() else None
    if projector is None and language_model is not None:
        raise CheckpointError(f"{path} holds its own language model: a language model goes with a stage I projector only")
    language_folder = folder if projector is None else None if language_model is None else _resolve(language_model)
    file = folder / "config.json"
    settings = read_json(file)
    model_type = settings.get("model_type")
    found = published_family(model_type)
    if found is None:
        known = ", ".join(f"[moe_]llava_{name}" for name in FAMILIES)
        raise CheckpointError(f"{file} has model_type {model_type!r}, but a published checkpoint has one of {known}")
    family, sparse = found
    if sparse and not isinstance(settings.get("moe"), dict):
        raise CheckpointError(f"{file} has model_type {model_type!r}, but no settings `moe`, which say what is sparse in it")
    name = settings.get("mm_image_tower")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{file} has mm_image_tower {name!r}, but must name the vision tower")
    tower, vision_config = find_tower(name, vision_towers)
    arguments = {
        "vision_config": vision_config,
        "text_config": _text_config(family, settings, file),
        **_llava_settings(settings, vision_config, file),
    }
    if sparse:
        # No token of the language model can have this id.
        arguments["image_token_id"] = settings["vocab_size"]
        config: LlavaConfig = _build(MoeLlavaConfig, arguments | _moe_settings(settings["moe"], file), file)
    else:
        arguments["image_token_id"] = free_row(settings, language_folder)
        config = _build(LlavaConfig, arguments, file)
    return Published(folder, settings, family, config, tower, projector, language_folder)


def find_tower(name: str, vision_towers: str | Path | None) -> tuple[str, PreTrainedConfig]:
    """(folder or hub id, configuration) of a vision tower.

    Raises CheckpointError, naming where it was looked for, if it is not found.
    """
    tower = name
    if vision_towers is not None:
        # Where a path was trained with, its last part is the name.
        places = [Path(vision_towers) / name.strip("/"), Path(vision_towers) / Path(name).name]
        found = [place for place in places if (place / "config.json").is_file()]
        if not found:
            raise CheckpointError(f"the vision tower {name} is in neither {places[0]} nor {places[1]}")
        tower = str(found[0])
    try:
        config = AutoConfig.from_pretrained(tower)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the vision tower {name} cannot be loaded from {tower}: {str(error).splitlines()[0]}") from error
    config = getattr(config, "vision_config", config)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # it would pool what comes after the layer that the features are taken from
    return tower, config


def image_features(vision_config: PreTrainedConfig, strategy: str) -> int:
    """Features that one image makes."""
    patches = (vision_config.image_size // vision_config.patch_size) ** 2
    return patches + extra_tokens(vision_config) - (strategy == "default")


def extra_tokens(vision_config: PreTrainedConfig) -> int:
    """Tokens that a tower puts before its patches: 1 for a class token, as CLIP has."""
    with torch.device("meta"):
        embeddings = MODEL_MAPPING[type(vision_config)](vision_config).get_submodule("embeddings")
    return embeddings.position_embedding.weight.shape[0] - embeddings.num_patches


def free_row(settings: dict[str, Any], folder: Path | None) -> int:
    """Where a dense model keeps its placeholder: the row of the tokenizer's own `<image>`, or the last one that no token has (without a
    tokenizer: none of the special ones in `settings`). If the vocabulary is full, the id after all others."""
    vocab_size = settings["vocab_size"]
    tokenizer = None if folder is None else load_tokenizer(folder, vocab_size)
    if tokenizer is None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
        taken = {settings[name] for name in names if isinstance(settings.get(name), int)}
    elif IMAGE_TOKEN in tokenizer.get_vocab():
        return tokenizer.get_vocab()[IMAGE_TOKEN]
    else:
        taken = set(tokenizer.get_vocab().values())
    return next((row for row in range(vocab_size - 1, -1, -1) if row not in taken), max(vocab_size, *(row + 1 for row in taken)))


def _load_weights(published: Published, folder: Path, dtype: torch.dtype | None) -> LlavaForConditionalGeneration:
    """`folder`: where all weights are, or all but the projector's."""
    meta = published.on_meta()
    pieces = layout.plan(meta, published.family)
    tables = read_tables(find_weights(folder))
    if published.projector is not None:
        tables.pop("lm_head.bias", None)  # some language models have one; the original code leaves it out
        tables |= read_tables([published.projector])
    if published.config.tie_word_embeddings and "lm_head.weight" not in tables:
        pieces = layout.without(pieces, "lm_head.")
    has_tower = any(piece.key in tables for piece in pieces if piece.target.startswith(_TOWER))
    if not has_tower:
        pieces = layout.without(pieces, _TOWER)
    layout.check(pieces, tables, meta, str(published.folder))
    dtype = dtype or tables[published.family.stored_name("embed_tokens.weight")[0]].dtype
    state = layout.read(pieces, tables, meta, dtype)
    if not has_tower:
        state |= {_TOWER + name: tensor for name, tensor in _load_tower(published, dtype).state_dict().items()}
    config = published.config
    if published.model_class is LlavaForConditionalGeneration and config.image_token_id >= config.text_config.vocab_size:
        _grow(config, state)
    model, report = published.model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise RuntimeError(f"{published.folder} was read wrongly: {report}")
    model.generation_config = _generation_config(published)
    return model


def _load_projector(published: Published, file: Path, dtype: torch.dtype | None) -> LlavaForConditionalGeneration:
    """Tower and projector, and a language model on the meta device."""
    model = published.on_meta()
    pieces = [piece for piece in layout.plan(model, published.family) if piece.target.startswith(_PROJECTOR)]
    tables = read_tables([file])
    layout.check(pieces, tables, model, str(file))
    dtype = dtype or tables[pieces[0].key].dtype
    state = layout.read(pieces, tables, model, dtype)
    model.model.vision_tower = _load_tower(published, dtype)
    model.model.multi_modal_projector.load_state_dict({name.removeprefix(_PROJECTOR): t for name, t in state.items()}, assign=True)
    return model.to(dtype).eval()


def _load_tower(published: Published, dtype: torch.dtype) -> PreTrainedModel:
    vision_config = published.config.vision_config
    try:
        tower, report = MODEL_MAPPING[type(vision_config)].from_pretrained(
            published.tower, config=vision_config, dtype=dtype, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{published.folder} has no weights of its vision tower, and {published.tower} has none either: {str(error).splitlines()[0]}"
        ) from error
    if report["missing_keys"] or report["mismatched_keys"]:
        problems = "\n  ".join(sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])))
        raise CheckpointError(f"the vision tower in {published.tower} lacks weights that its config.json describes:\n  {problems}")
    return tower


def _grow(config: LlavaConfig, state: dict[str, Tensor]) -> None:
    """Gives the placeholder a row, of zeros, after a vocabulary that is full: transformers' dense LLaVA needs one."""
    added = config.image_token_id + 1 - config.text_config.vocab_size
    config.text_config.vocab_size += added
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            state[name] = torch.cat([state[name], state[name].new_zeros(added, state[name].shape[1])])


def _generation_config(published: Published) -> GenerationConfig:
    """The published end, beginning and padding ids. Greedy, as the published models were tested; none of the sampling settings that some
    carry over from their language model's chat."""
    file = published.folder / "generation_config.json"
    settings = published.settings | (read_json(file) if file.is_file() else {})
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = GenerationConfig(**{name: settings.get(name) for name in names})
    if published.model_class is LlavaForConditionalGeneration:
        generation.suppress_tokens = [published.config.image_token_id]  # a row of the vocabulary that is no token
    return generation


def _resolve(path: str | Path) -> Path:
    """A folder on this machine, fetched from the hub if need be."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_file() and folder.name == PROJECTOR_FILE:
        return folder.parent
    if len(folder.parts) != 2 or folder.is_absolute():
        raise CheckpointError(f"checkpoint {path} is not a folder")
    try:
        return Path(snapshot_download(str(path), allow_patterns=_FILES_OF_A_CHECKPOINT))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a folder, and the hub did not give it: {str(error).splitlines()[0]}") from error


def _text_config(family: Family, settings: dict[str, Any], file: Path) -> PreTrainedConfig:
    """The language model's configuration in transformers' words."""
    missing = [name for name in _NEEDED if name not in settings]
    if missing:
        raise CheckpointError(f"{file} does not say {', '.join(missing)}")
    for name, value in family.required.items():
        if settings.get(name, value) != value:
            raise CheckpointError(f"{file} has {name} {settings[name]!r}, but only {value!r} is computed here as it was there")
    text_class = CONFIG_MAPPING[family.config]
    known = {f.name for f in dataclasses.fields(text_class)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
    renamed = {name: settings[old] for old, name in family.settings.items() if old in settings}
    values = {name: value for name, value in (renamed | settings).items() if name in known}
    values |= {name: value for name, value in (renamed | settings).items() if name in _ROPE and value is not None}
    values |= {name: values[name] // 2 for name in family.halved}
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    return _build(text_class, values, file)


def _llava_settings(settings: dict[str, Any], vision_config: PreTrainedConfig, file: Path) -> dict[str, Any]:
    projector, feature = settings.get("image_projector_type"), settings.get("mm_vision_select_feature", "patch")
    if projector != "mlp2x_gelu":
        raise CheckpointError(f"{file} has image_projector_type {projector!r}, but must have 'mlp2x_gelu': two layers with GELU between")
    if feature not in _STRATEGIES:
        raise CheckpointError(f"{file} has mm_vision_select_feature {feature!r}, but must have one of {', '.join(_STRATEGIES)}")
    return {
        "projector_hidden_act": "gelu",
        "vision_feature_layer": settings.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _STRATEGIES[feature],
        "image_seq_length": image_features(vision_config, _STRATEGIES[feature]),
        "tie_word_embeddings": settings.get("tie_word_embeddings", False),
    }


def _moe_settings(moe: dict[str, Any], file: Path) -> dict[str, Any]:
    missing = [name for name in ("num_experts", "top_k_experts", "moe_layers_idx") if moe.get(name) in (None, [])]
    if missing:
        raise CheckpointError(f"{file} does not say {', '.join(f'moe.{name}' for name in missing)}")
    numbers = moe["num_experts"] if isinstance(moe["num_experts"], list) else [moe["num_experts"]]
    if len(set(numbers)) != 1:
        raise CheckpointError(f"{file} has moe.num_experts {numbers}, but all layers must have the same number of experts")
    return {
        "num_experts": numbers[0],
        "num_experts_per_tok": moe["top_k_experts"],
        "moe_layers": moe["moe_layers_idx"],
        "norm_topk_prob": moe["top_k_experts"] > 1,  # the original divides two weights by their sum, and leaves a single one as it is
        "router_aux_loss_coef": moe.get("router_aux_loss_coef", 0.01),
        "use_residual": moe.get("use_residual", False),
    }


def _build(config_class: type[PreTrainedConfig], values: dict[str, Any], file: Path) -> Any:
    try:
        return config_class(**values)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{file} makes no {config_class.__name__}: {error}") from error
