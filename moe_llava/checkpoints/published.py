"""Loads what the original MoE-LLaVA code published: sparse models, dense ones of stage II, projectors of stage I.

Unusual here:
- Nothing is dropped at inference (`capacity_factor` None), as the published models were meant to be used; the capacity of 1.5 that they
  were trained with is a setting of stage III.
- The tower's weights come from the checkpoint where it holds them. The original code always took the ones that `mm_image_tower` names.
- transformers' dense LLaVA looks every id up in its embedding table, so the placeholder there must be a row: one that no token has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    MODEL_MAPPING,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from moe_llava.checkpoints import layout
from moe_llava.checkpoints.families import FAMILIES, Family, published_family
from moe_llava.checkpoints.files import check_no_adapter, check_no_other_llava, check_quantisation, hub_file, read_json
from moe_llava.checkpoints.load import load_strictly
from moe_llava.checkpoints.settings import (
    build_config,
    check_language_model,
    find_tower,
    llava_settings,
    moe_settings,
    no_tokens,
    text_config,
)
from moe_llava.checkpoints.tokenization import load_tokenizer
from moe_llava.checkpoints.weights import PROJECTOR_FILE, WEIGHT_FILES, StoredTensor, find_weights, read_tables
from moe_llava.common.errors import CheckpointError
from moe_llava.common.messages import first_line
from moe_llava.data.records import IMAGE_TOKEN
from moe_llava.model import MoeLlavaConfig, MoeLlavaForConditionalGeneration

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_SETTINGS, _WEIGHTS = ["*.json", "*.tiktoken", "*.model", "*.txt"], ["*.safetensors", "*.bin"]


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
        """The model without weights, in no memory. Raises CheckpointError if its settings make none."""
        try:
            with torch.device("meta"):
                return self.model_class._from_config(self.config)
        except (AssertionError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{self.folder / 'config.json'} makes no model: {first_line(error)}") from error

    @cached_property
    def tables(self) -> tuple[dict[str, StoredTensor], dict[str, list[str]]]:
        """(what is stored and used, names of what is stored and not used, by reason)."""
        files = [] if self.projector is None else [self.projector]
        if self.language_model is not None:
            files = [*find_weights(self.language_model), *files]
        tables = read_tables(files)
        unused = layout.unused(tables)
        if self.projector is not None and "lm_head.bias" in tables:
            unused["the bias of the language model's head, which the original code leaves out"] = ["lm_head.bias"]
        if self.config.tie_word_embeddings and "lm_head.weight" in tables:
            unused["the head, which is tied to the embedding table"] = ["lm_head.weight"]
        passed_over = {name for names in unused.values() for name in names}
        return {name: stored for name, stored in tables.items() if name not in passed_over}, unused

    def load(self, dtype: torch.dtype | None = None) -> LlavaForConditionalGeneration:
        """Reads the weights. Raises CheckpointError as `load_published` does."""
        return _load_weights(self, dtype) if self.language_model is not None else _load_projector(self, dtype)


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
        dtype: of the result; None takes the one in which the embedding table is stored (of stage I, the projector), for all weights.

    Returns a MoeLlavaForConditionalGeneration, or a LlavaForConditionalGeneration for stages I and II.

    Raises CheckpointError, naming file and rule, if the checkpoint is damaged, incomplete, of an unknown family, or its tower is not found.
    """
    return look_at(path, vision_towers, language_model).load(dtype)


def look_at(
    path: str | Path,
    vision_towers: str | Path | None = None,
    language_model: str | Path | None = None,
    with_weights: bool = True,
) -> Published:
    """Reads configurations and tokenizer only; from the hub, `with_weights` fetches the rest too.

    Raises CheckpointError as `load_published` does.
    """
    folder = resolve(path, with_weights)
    check_no_adapter(folder)
    has_weights = any((folder / name).is_file() for name in WEIGHT_FILES)
    projector = folder / PROJECTOR_FILE if Path(path).name == PROJECTOR_FILE or not has_weights else None
    if projector is not None and not projector.is_file():
        projector = None
    if projector is None and language_model is not None:
        raise CheckpointError(f"{path} holds its own language model: a language model goes with a stage I projector only")
    language_folder = folder if projector is None else None if language_model is None else resolve(language_model, with_weights)
    file = folder / "config.json"
    settings = read_json(file)
    check_no_other_llava(settings, path)
    check_quantisation(settings, path)
    model_type = settings.get("model_type")
    found = published_family(model_type)
    if model_type == MoeLlavaConfig.model_type or (model_type == "llava" and "vision_config" in settings):
        raise CheckpointError(f"{path} is no published checkpoint: it loads as it is")
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
    if projector is not None and language_folder is not None:
        check_language_model(family, settings, file, language_folder / "config.json")
    arguments = {
        "vision_config": vision_config,
        "text_config": text_config(family, settings, file),
        **llava_settings(settings, vision_config, file),
    }
    if sparse:
        # No token of the language model can have this id.
        arguments["image_token_id"] = settings["vocab_size"]
        config: LlavaConfig = build_config(MoeLlavaConfig, arguments | moe_settings(settings["moe"], file), file)
    else:
        tokenizer = None if language_folder is None else load_tokenizer(language_folder, settings["vocab_size"])
        arguments["image_token_id"] = free_row(settings, tokenizer)
        config = build_config(LlavaConfig, arguments, file)
    return Published(folder, settings, family, config, tower, projector, language_folder)


def free_row(settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None) -> int:
    """Where a dense model keeps its placeholder: the row of the tokenizer's own `<image>`, or the last one that no token has (without a
    tokenizer: none of the special ones in `settings`). If the vocabulary is full, the id after all others."""
    vocab_size = settings["vocab_size"]
    if tokenizer is None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
        taken = {settings[name] for name in names if isinstance(settings.get(name), int)}
    elif IMAGE_TOKEN in tokenizer.get_vocab():
        return tokenizer.get_vocab()[IMAGE_TOKEN]
    else:
        taken = set(tokenizer.get_vocab().values())
    return next((row for row in range(vocab_size - 1, -1, -1) if row not in taken), max(vocab_size, *(row + 1 for row in taken)))


def _load_weights(published: Published, dtype: torch.dtype | None) -> LlavaForConditionalGeneration:
    meta = published.on_meta()
    pieces = layout.plan(meta, published.family)
    tables, _ = published.tables
    if published.config.tie_word_embeddings:
        pieces = layout.without(pieces, "lm_head.")
    has_tower = any(piece.key in tables for piece in pieces if piece.target.startswith(_TOWER))
    if not has_tower:
        pieces = layout.without(pieces, _TOWER)
    layout.check(pieces, tables, meta, " and ".join(str(place) for place in (published.language_model, published.projector) if place))
    dtype = dtype or tables[published.family.stored_name("embed_tokens.weight")[0]].dtype
    state = layout.read(pieces, tables, meta, dtype)
    if not has_tower:
        state |= {
            _TOWER + name: tensor
            for name, tensor in load_tower(published.tower, published.config.vision_config, dtype).state_dict().items()
        }
    model = assemble(published.model_class, published.config, state, dtype)
    model.generation_config = _generation_config(published)
    return model


def assemble(
    model_class: type[LlavaForConditionalGeneration], config: LlavaConfig, state: dict[str, Tensor], dtype: torch.dtype, **settings: Any
) -> LlavaForConditionalGeneration:
    """The model of `config` with the tensors of `state`, which are not copied; `settings` go to `from_pretrained`. A dense model's
    placeholder gets a row if it has none."""
    if model_class is LlavaForConditionalGeneration and config.image_token_id >= config.text_config.vocab_size:
        _grow(config, state)
    arguments = settings | {"config": config, "state_dict": state, "dtype": dtype, "output_loading_info": True}
    model, report = model_class.from_pretrained(None, **arguments)
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise RuntimeError(f"the weights do not fit the configuration: {report}")
    return model


def _load_projector(published: Published, dtype: torch.dtype | None) -> LlavaForConditionalGeneration:
    """Tower and projector, and a language model on the meta device."""
    model = published.on_meta()
    pieces = [piece for piece in layout.plan(model, published.family) if piece.target.startswith(_PROJECTOR)]
    tables, _ = published.tables
    layout.check(pieces, tables, model, str(published.projector))
    dtype = dtype or tables[pieces[0].key].dtype
    state = layout.read(pieces, tables, model, dtype)
    model.model.vision_tower = load_tower(published.tower, published.config.vision_config, dtype)
    model.model.multi_modal_projector.load_state_dict({name.removeprefix(_PROJECTOR): t for name, t in state.items()}, assign=True)
    return model.to(dtype).eval()


def load_tower(tower: str, vision_config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The vision tower in a folder or hub id, which may hold a whole CLIP or SigLIP. Raises CheckpointError if its weights are not all
    there."""
    return load_strictly(MODEL_MAPPING[type(vision_config)], tower, vision_config, f"the vision tower {tower}", dtype=dtype)


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
    vocab_size = published.settings["vocab_size"]
    return GenerationConfig(**{name: settings.get(name) for name in names}, suppress_tokens=no_tokens(published.config, vocab_size))


def resolve(path: str | Path, with_weights: bool) -> Path:
    """A folder on this machine, fetched from the hub if need be."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_file() and folder.name == PROJECTOR_FILE:
        return folder.parent
    if len(folder.parts) != 2 or folder.is_absolute():
        raise CheckpointError(f"checkpoint {path} is not a folder")
    hub_file(str(path), "config.json")  # asks once, where the download would try for long
    try:
        return Path(snapshot_download(str(path), allow_patterns=_SETTINGS + _WEIGHTS if with_weights else _SETTINGS))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a folder, and the hub did not give it: {first_line(error)}") from error
