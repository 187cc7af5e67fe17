"""Join a language model and a vision tower with an untrained projector into a dense LLaVA, the start of stage I.

The features are those of the tower's second-last layer, without a class token, and the projector is two linear layers with GELU between
(paper, section 3.1).

Unusual here:
- A language model may be a GGUF file (gguf.py).
- Any tower of transformers will do that returns a token for each patch, and at most a class token before them (towers.py).
- All patches of a SigLIP tower are features. The published 384-pixel models leave the first one out; see docs/checkpoints.md.
- The bias of a language model's head, which Phi has, is left out, as in the original code: no LLaVA has one.
- A tokenizer without a padding token pads with its unknown token or, if it has none, with its end of text, as in the original code. Labels
  are masked by position, so an end of text that ends an answer is a target all the same.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from moe_llava.checkpoints import layout
from moe_llava.checkpoints.families import FAMILIES, Family
from moe_llava.checkpoints.files import quantisation_method, read_config, read_json, resolve
from moe_llava.checkpoints.gguf import language_folder
from moe_llava.checkpoints.load import load_strictly
from moe_llava.checkpoints.processors import image_processor, make_processor, pixel_size, resize_images, set_token_ids
from moe_llava.checkpoints.published import assemble, free_row, load_tower, prefixed
from moe_llava.checkpoints.settings import build_config, describes_llava, find_tower, llava_settings, text_config
from moe_llava.checkpoints.tokenization import load_tokenizer
from moe_llava.checkpoints.towers import check_tower, extra_tokens, resize_positions
from moe_llava.checkpoints.weights import find_weights, read_tables
from moe_llava.common.errors import CheckpointError
from moe_llava.common.messages import first_line
from moe_llava.data import rendering
from moe_llava.data.rendering import make_portable
from moe_llava.data.templates import IMAGE_TOKEN

TEXT_LENGTH = 2048  # tokens after which text alone is cut, unless the tokenizer's limit is lower (paper, table of training settings)
_BACKBONE, _HEAD = "model.language_model.", "lm_head."


def joined_config(language_model: str, vision_tower: str, image_size: int | None = None) -> LlavaConfig:
    """Return the configuration of a LLaVA from two folders or hub ids, whose config.json is all that is read. Its placeholder has the id
    after the vocabulary; the right one depends on the tokenizer. `image_size`: that of the tower, in pixels; None for its own.

    Raises CheckpointError if one is not found, or is no language model or vision tower.
    """
    text, _ = language_config(language_model)
    _, vision = find_tower(vision_tower, None)
    _check(vision_tower, vision)
    if image_size is not None:
        if image_size % vision.patch_size:
            raise CheckpointError(
                f"image_size is {image_size}, but must be a multiple of {vision.patch_size}, the patch size of the tower {vision_tower}"
            )
        vision.image_size = image_size
    settings = {
        "image_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch" if extra_tokens(vision) else "cls_patch",
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    arguments = llava_settings(settings, vision, Path(vision_tower, "config.json"))
    arguments |= {"text_config": text, "vision_config": vision, "image_token_id": text.vocab_size}
    return build_config(LlavaConfig, arguments, Path(language_model, "config.json"))


def joined_processor(language_model: str, vision_tower: str, template: str | None, image_size: int | None = None) -> LlavaProcessor:
    """Return the processor of that LLaVA. `template`: its chat template, a key of TEMPLATES; None for the tokenizer's own. Images are
    preprocessed as the tower's own file says, without padding, but for another `image_size`.

    Raises CheckpointError as `joined_config` does, and if there is no tokenizer, or one that does not fit the template.
    """
    config = joined_config(language_model, vision_tower, image_size)
    vocab_size = config.text_config.vocab_size
    tokenizer = _load_tokenizer(
        resolve(language_folder(language_model), with_weights=False), vocab_size, f"the language model {language_model}"
    )
    config.image_token_id = free_row({"vocab_size": vocab_size}, tokenizer)
    images = image_processor(vision_tower, pad=False)
    if image_size is not None:
        resize_images(images, image_size, vision_tower)
    _check(vision_tower, config.vision_config, pixel_size(images, vision_tower))
    return make_processor(config, images, tokenizer, template, language_model)


def _check(name: str, vision: PreTrainedConfig, size: tuple[int, int] | None = None) -> None:
    """Raise CheckpointError unless a tower's features suit a LLaVA, for images of `size` (height, width), or of the tower's own."""
    try:
        check_tower(vision, size)
    except CheckpointError as error:
        raise CheckpointError(f"the vision tower {name} cannot be used: {error}") from error


def language_tokenizer(name: str, own_template: bool) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a language model, or a tokenizer alone, as a joined LLaVA has it, but without a placeholder. With
    `own_template`, its chat template is made to take parts.

    Raises CheckpointError if there is no tokenizer, DataError if its own chat template is wanted and there is none.
    """
    folder = resolve(language_folder(name), with_weights=False)
    vocab_size = read_json(folder / "config.json").get("vocab_size") if (folder / "config.json").is_file() else None
    tokenizer = _load_tokenizer(folder, vocab_size or sys.maxsize, name)
    if own_template:
        tokenizer.chat_template = make_portable(rendering.own_template(tokenizer), tokenizer, IMAGE_TOKEN)
    return tokenizer


def _load_tokenizer(folder: Path, vocab_size: int, name: str) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(folder, vocab_size)
    if tokenizer is None:
        raise CheckpointError(f"{name} has no tokenizer files")
    tokenizer.model_max_length = min(tokenizer.model_max_length, TEXT_LENGTH)
    return tokenizer


def join(
    language_model: str,
    vision_tower: str,
    template: str | None,
    seed: int,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return (dense LLaVA in evaluation mode, processor), with the weights of both parts and a projector that is initialised like torch's
    linear layers, from `seed`. It needs the memory of the weights in `dtype`, which are not copied.

    Args: as for `joined_processor`; `settings` are for `from_pretrained`.

    Raises CheckpointError as `joined_processor` does, or if weights are missing.
    """
    processor = joined_processor(language_model, vision_tower, template, image_size)
    config = joined_config(language_model, vision_tower, image_size)
    config.image_token_id = processor.image_token_id
    height, width = pixel_size(processor.image_processor, vision_tower)
    config.image_seq_length = (height // processor.patch_size) * (width // processor.patch_size)
    vocab_size = config.text_config.vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config).to(dtype)
    state = _language_weights(language_model, config, dtype)
    _, own = find_tower(vision_tower, None)
    tower = load_tower(vision_tower, own, dtype)
    if image_size is not None:
        resize_positions(tower, image_size)
    state |= prefixed("model.vision_tower.", tower)
    state |= prefixed("model.multi_modal_projector.", projector)
    model = assemble(LlavaForConditionalGeneration, config, state, dtype, **settings)
    model.generation_config = GenerationConfig(bos_token_id=processor.tokenizer.bos_token_id)
    set_token_ids(model.generation_config, config, processor, template, vocab_size)
    return model, processor


def language_config(name: str) -> tuple[PreTrainedConfig, Family | None]:
    """Return (configuration, family) of a language model. The family is None unless transformers lacks the layout, as of the Qwen of
    2023."""
    name = language_folder(name)
    try:
        content = read_config(name)
    except CheckpointError as error:
        raise CheckpointError(f"the language model {name} is not found: {error}") from error
    model_type = content.get("model_type")
    if describes_llava(content):
        raise CheckpointError(
            f"the language model {name} is a model with a vision tower already ({model_type}): "
            "a LLaVA is named as `model` itself, without vision_tower"
        )
    if quantisation_method(content):
        raise CheckpointError(
            f"the language model {name} is quantised by {quantisation_method(content)}: a LLaVA is joined from plain weights"
        )
    if model_type in FAMILIES and model_type not in CONFIG_MAPPING:
        return text_config(FAMILIES[model_type], content, Path(name, "config.json")), FAMILIES[model_type]
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the config.json of the language model {name} cannot be used: {first_line(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"the config.json of {name} has model_type {model_type!r}, which is no language model")
    return config, None


def _language_weights(name: str, config: LlavaConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a language model's backbone and head, by their names in the LLaVA."""
    name = language_folder(name)
    text, family = language_config(name)
    if family is None:
        model = load_strictly(MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], name, text, f"the language model {name}", dtype=dtype)
        state = prefixed(_BACKBONE, model.base_model)
        return state if config.tie_word_embeddings else state | {f"{_HEAD}weight": model.get_output_embeddings().weight.data}
    folder = resolve(name, with_weights=True)
    tables = read_tables(find_weights(folder))
    for key in [key for names in layout.unused(tables).values() for key in names]:
        del tables[key]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(config)
    pieces = [piece for piece in layout.plan(model, family) if piece.target.startswith((_BACKBONE, _HEAD))]
    layout.check(pieces, tables, model, str(folder))
    return layout.read(pieces, tables, model, dtype)
