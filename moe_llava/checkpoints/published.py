"""Load and convert the checkpoints of the original MoE-LLaVA code: sparse models, dense ones of stage II, projectors of stage I.

Unusual here:
- No token is dropped at inference (`capacity_factor` None), as intended for the published models; the capacity of 1.5 in their training is
  a setting of stage III.
- The tower's weights come from the checkpoint if it holds them. The original code always took those that `mm_image_tower` names.
- The dense LLaVA of transformers looks every id up in its embedding table, so its placeholder must be a row: one that no token has.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
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
from moe_llava.checkpoints.families import POOLER, TOWERS, Family
from moe_llava.checkpoints.files import (
    PROJECTOR_FILE,
    check_no_adapter,
    check_published,
    read_json,
    resolve,
)
from moe_llava.checkpoints.load import load_strictly
from moe_llava.checkpoints.processors import image_processor, make_processor, set_token_ids
from moe_llava.checkpoints.settings import (
    build_config,
    check_language_model,
    find_tower,
    llava_settings,
    moe_settings,
    no_tokens,
    text_config,
)
from moe_llava.checkpoints.tokenization import highest_id, load_tokenizer
from moe_llava.checkpoints.weights import WEIGHT_FILES, StoredTensor, find_weights, read_tables
from moe_llava.common.errors import CheckpointError
from moe_llava.common.files import new_folder
from moe_llava.common.messages import first_line
from moe_llava.data.records import IMAGE_TOKEN
from moe_llava.model import MoeLlavaConfig, MoeLlavaForConditionalGeneration

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."


@dataclass(frozen=True)
class Published:
    """A checkpoint of the original code that is not loaded yet.

    `settings`: its config.json. `tower`: folder or hub id of its vision tower. `projector`: the only weight file of a stage I checkpoint.
    `language_model`: the folder of the language model and its tokenizer; None for a projector alone.
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
        """Return the model without weights, in no memory. Raises CheckpointError if its settings define no model."""
        try:
            with torch.device("meta"):
                return self.model_class._from_config(self.config)
        except (AssertionError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"{self.folder / 'config.json'} defines no model: {first_line(error)}") from error

    @cached_property
    def tables(self) -> tuple[dict[str, StoredTensor], dict[str, list[str]]]:
        """Stored tensors that are used, by name, and the names of those that are not, by reason."""
        files = find_weights(self.language_model) if self.language_model is not None else []
        tables = read_tables(files if self.projector is None else [*files, self.projector])
        unused = layout.unused(tables)
        if self.projector is not None and "lm_head.bias" in tables:
            unused["the bias of the language model's head, which the original code leaves out"] = ["lm_head.bias"]
        if self.config.tie_word_embeddings and "lm_head.weight" in tables:
            unused["the head, which is tied to the embedding table"] = ["lm_head.weight"]
        left_out = {name for names in unused.values() for name in names}
        return {name: stored for name, stored in tables.items() if name not in left_out}, unused

    def load(self, dtype: torch.dtype | None = None) -> LlavaForConditionalGeneration:
        """Return the model with its weights. Raises CheckpointError as `load_published` does."""
        return _load_projector(self, dtype) if self.language_model is None else _load_weights(self, dtype)


def load_published(
    path: str | Path,
    vision_towers: str | Path | None = None,
    *,
    language_model: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> LlavaForConditionalGeneration:
    """Return the model of a published checkpoint, in evaluation mode: a MoeLlavaForConditionalGeneration, or a
    LlavaForConditionalGeneration for stages I and II.

    Args:
        path: a folder, or a hub id. A stage I folder holds a projector alone (`mm_projector.bin`, which may itself be the path).
        vision_towers: a folder in which to find the checkpoint's `mm_image_tower`; None for the hub.
        language_model: for a stage I projector, the folder or hub id of the language model that it was trained with. Without it the
            result has tower and projector, and a language model without weights, on the meta device.
        dtype: of the result; None for that of the stored embedding table (of stage I, the projector), for all weights.

    Raises CheckpointError, naming file and rule, if the checkpoint is damaged, incomplete, of an unknown family, or its tower is not found.
    """
    return inspect_published(path, vision_towers, language_model).load(dtype)


def inspect_published(
    path: str | Path,
    vision_towers: str | Path | None = None,
    language_model: str | Path | None = None,
    with_weights: bool = True,
) -> Published:
    """Return a checkpoint of which only configurations and tokenizer were read. From the hub, `with_weights` downloads the rest too.

    Raises CheckpointError as `load_published` does.
    """
    folder = resolve(path, with_weights)
    check_no_adapter(folder)
    is_projector = Path(path).name == PROJECTOR_FILE or not any((folder / name).is_file() for name in WEIGHT_FILES)
    projector = folder / PROJECTOR_FILE if is_projector and (folder / PROJECTOR_FILE).is_file() else None
    if projector is None and language_model is not None:
        raise CheckpointError(f"{path} holds its own language model: a language model goes with a stage I projector only")
    language_folder = folder if projector is None else None if language_model is None else resolve(language_model, with_weights)
    file = folder / "config.json"
    settings = read_json(file)
    family, sparse = check_published(settings, file, path)
    tower, vision_config = find_tower(settings["mm_image_tower"], vision_towers)
    if vision_config.model_type not in TOWERS:
        found = f"has model_type {vision_config.model_type!r}, but must have one of {', '.join(TOWERS)}"
        raise CheckpointError(f"the vision tower {tower} {found}")
    if projector is not None and language_folder is not None:
        check_language_model(family, settings, file, language_folder / "config.json")
    arguments = llava_settings(settings, vision_config, file)
    arguments |= {"vision_config": vision_config, "text_config": text_config(family, settings, file)}
    if sparse:
        # No token of the language model has this id.
        arguments |= {"image_token_id": settings["vocab_size"], **moe_settings(settings["moe"], file)}
    else:
        tokenizer = None if language_folder is None else load_tokenizer(language_folder, settings["vocab_size"])
        arguments["image_token_id"] = free_row(settings, tokenizer)
    config = build_config(MoeLlavaConfig if sparse else LlavaConfig, arguments, file)
    return Published(folder, settings, family, config, tower, projector, language_folder)


def free_row(settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None) -> int:
    """Return the id of a dense model's placeholder: the tokenizer's own `<image>`, or the last row that no token has (without a tokenizer:
    none of the special tokens in `settings`). If the vocabulary is full, it is the id after all others."""
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
    has_tower = any(piece.key in tables for piece in pieces if piece.target.startswith(_TOWER))
    left_out = (*(["lm_head."] if published.config.tie_word_embeddings else []), *([] if has_tower else [_TOWER]))
    pieces = [piece for piece in pieces if not piece.target.startswith(left_out)]
    layout.check(pieces, tables, meta, " and ".join(str(path) for path in (published.language_model, published.projector) if path))
    dtype = dtype or tables[published.family.stored_name("embed_tokens.weight")[0]].dtype
    state = layout.read(pieces, tables, meta, dtype)
    if not has_tower:
        state |= prefixed(_TOWER, load_tower(published.tower, published.config.vision_config, dtype))
    model = assemble(published.model_class, published.config, state, dtype)
    model.generation_config = _generation_config(published)
    return model


def _load_projector(published: Published, dtype: torch.dtype | None) -> LlavaForConditionalGeneration:
    """Return a model with tower and projector, and its language model on the meta device."""
    model = published.on_meta()
    pieces = [piece for piece in layout.plan(model, published.family) if piece.target.startswith(_PROJECTOR)]
    tables, _ = published.tables
    layout.check(pieces, tables, model, str(published.projector))
    dtype = dtype or tables[pieces[0].key].dtype
    state = layout.read(pieces, tables, model, dtype)
    model.model.vision_tower = load_tower(published.tower, published.config.vision_config, dtype)
    model.model.multi_modal_projector.load_state_dict({name.removeprefix(_PROJECTOR): t for name, t in state.items()}, assign=True)
    return model.to(dtype).eval()


def prefixed(prefix: str, module: torch.nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module by their names with `prefix`."""
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def assemble(
    model_class: type[LlavaForConditionalGeneration], config: LlavaConfig, state: dict[str, Tensor], dtype: torch.dtype, **settings: Any
) -> LlavaForConditionalGeneration:
    """Return the model of `config` with the tensors of `state`, which are not copied; `settings` are for `from_pretrained`. If a dense
    model's placeholder has no row, because the vocabulary is full, a row of zeros is added."""
    added = config.image_token_id + 1 - config.text_config.vocab_size
    if model_class is LlavaForConditionalGeneration and added > 0:
        config.text_config.vocab_size += added
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            if name in state:
                state[name] = torch.cat([state[name], state[name].new_zeros(added, state[name].shape[1])])
    model, report = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **settings)
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise RuntimeError(f"the weights do not fit the configuration: {report}")
    return model


def load_tower(tower: str, vision_config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the vision tower of a folder or hub id, which may hold a whole CLIP or SigLIP, or a classifier.

    Raises CheckpointError if weights are missing, other than those of a pooling layer, which classifiers lack. A LLaVA does not use it, so
    it is initialised at random, from a fixed seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = MODEL_MAPPING[type(vision_config)]
        return load_strictly(kind, tower, vision_config, f"the vision tower {tower}", (POOLER,), dtype=dtype)


def _generation_config(published: Published) -> GenerationConfig:
    """Return greedy generation, as the published models were tested, with the published end, beginning and padding ids. Sampling settings,
    which some checkpoints keep from their language model's chat, are left out."""
    file = published.folder / "generation_config.json"
    settings = published.settings | (read_json(file) if file.is_file() else {})
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    vocab_size = published.settings["vocab_size"]
    return GenerationConfig(**{name: settings.get(name) for name in names}, suppress_tokens=no_tokens(published.config, vocab_size))


def convert(path: str | Path, out: Path, vision_towers: str | Path | None = None, language_model: str | Path | None = None) -> list[str]:
    """Write `out`, a new folder for `from_pretrained` and `pipeline`, and return the lines of a summary. Without a tokenizer, the folder
    holds a model with its image processor.

    Args: as for `load_published`.

    Raises CheckpointError as `load_published` does, or FileExistsError if `out` exists; then nothing is left behind.
    """
    with new_folder(out) as folder:
        published = inspect_published(path, vision_towers, language_model)
        if published.language_model is None:
            raise CheckpointError(f"{path} holds a projector alone: name the language model that it was trained with (--language-model)")
        vocab_size = published.settings["vocab_size"]
        images = image_processor(published.tower, pad=published.settings.get("image_aspect_ratio") == "pad")
        tokenizer = load_tokenizer(published.language_model, vocab_size)
        if tokenizer is None:
            model = published.load()
            images.save_pretrained(folder)
        else:
            by_token = published.family.templates_by_token.items()
            template = next((name for token, name in by_token if token in tokenizer.get_vocab()), published.family.template)
            image = _image_text(published, tokenizer)
            processor = make_processor(published.config, images, tokenizer, template, str(published.language_model), image)
            model = published.load()
            model.config.image_token_id = processor.image_token_id
            set_token_ids(model.generation_config, model.config, processor, template, vocab_size)
            processor.save_pretrained(folder)
        model.save_pretrained(folder)
    return _summary(published, model, tokenizer)


def _image_text(published: Published, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the text of an image. Raises CheckpointError if the tokenizer does not know the tokens around it."""
    if not published.settings.get("mm_use_im_start_end"):
        return IMAGE_TOKEN
    if not {"<im_start>", "<im_end>"} <= tokenizer.get_vocab().keys():
        raise CheckpointError(
            f"{published.folder / 'config.json'} has mm_use_im_start_end, but the tokenizer does not know <im_start> and <im_end>"
        )
    return f"<im_start>{IMAGE_TOKEN}<im_end>"


def _summary(published: Published, model: Any, tokenizer: PreTrainedTokenizerFast | None) -> list[str]:
    config = model.config
    lines = [f"{published.settings['model_type']}: {model.num_parameters():,} parameters in {str(model.dtype).removeprefix('torch.')}"]
    if isinstance(config, MoeLlavaConfig):
        lines.append(
            f"experts: {config.num_experts}, of which a token uses {config.num_experts_per_tok}, in layers {config.moe_layer_indices}"
        )
    tables, unused = published.tables
    lines += [f"not used, {reason}: {', '.join(names)}" for reason, names in unused.items()]
    others = Counter(stored.dtype for stored in tables.values() if stored.dtype != model.dtype)
    lines += [f"converted from {str(dtype).removeprefix('torch.')}: {number} of {len(tables)} tensors" for dtype, number in others.items()]
    vocab_size = published.settings["vocab_size"]
    if tokenizer is None:
        lines.append(f"no tokenizer: {published.language_model} has none, so the folder holds the model and its image processor alone")
    elif highest_id(tokenizer) >= vocab_size:
        lines.append(
            f"warning: the tokenizer has ids up to {highest_id(tokenizer)}, but the model's vocabulary ends at {vocab_size - 1}: "
            "they do not belong together, and a text with higher ids is an error"
        )
    return lines
