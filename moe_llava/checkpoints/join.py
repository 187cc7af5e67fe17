"""A dense LLaVA joined from a language model and a vision tower, behind a projector that has learnt nothing: where stage I starts.

The class token of a tower is left out, the features are those of the second-last layer, and the projector is two linear layers with GELU
between (paper, section 3.1).

Unusual here:
- All patches of a SigLIP tower are features. The published 384-pixel models leave the first one out; see docs/checkpoints.md.
- The bias of a language model's head, which Phi has, is left out, as in the original code: no LLaVA has one.
- A tokenizer without a padding token pads with its unknown token or, if it has none, with its end of text, as the original code does.
  Labels are masked by position, so an end of text that ends an answer is learnt all the same.
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
from moe_llava.checkpoints.files import quantisation_method, read_config, read_json
from moe_llava.checkpoints.load import load_strictly
from moe_llava.checkpoints.processors import image_processor, make_processor, set_token_ids
from moe_llava.checkpoints.published import assemble, free_row, load_tower, resolve
from moe_llava.checkpoints.settings import build_config, describes_llava, extra_tokens, find_tower, llava_settings, text_config
from moe_llava.checkpoints.tokenization import load_tokenizer
from moe_llava.checkpoints.weights import find_weights, read_tables
from moe_llava.common.errors import CheckpointError
from moe_llava.common.messages import first_line
from moe_llava.data import rendering
from moe_llava.data.rendering import make_portable
from moe_llava.data.templates import IMAGE_TOKEN

TEXT_LENGTH = 2048  # tokens at which text alone is cut, if the tokenizer does not say less (paper, table of training settings)
_BACKBONE, _HEAD = "model.language_model.", "lm_head."


def joined_config(language_model: str, vision_tower: str) -> LlavaConfig:
    """The configuration of the LLaVA that two folders or hub ids make, from their config.json alone. Its placeholder stands after the
    vocabulary; which row it gets, the tokenizer decides.

    Raises CheckpointError if one is not found, or is not what it should be.
    """
    text, _ = language_config(language_model)
    _, vision = find_tower(vision_tower, None)
    settings = {
        "image_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch" if extra_tokens(vision) else "cls_patch",
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    arguments = llava_settings(settings, vision, Path(vision_tower, "config.json"))
    arguments |= {"text_config": text, "vision_config": vision, "image_token_id": text.vocab_size}
    return build_config(LlavaConfig, arguments, Path(language_model, "config.json"))


def joined_processor(language_model: str, vision_tower: str, template: str | None) -> LlavaProcessor:
    """The processor of that LLaVA. `template`: the conversation form of its chat template; None keeps the tokenizer's own. Images are
    prepared as the tower's own file says, without padding.

    Raises CheckpointError as `joined_config` does, if there is no tokenizer, or one that does not fit the template.
    """
    config = joined_config(language_model, vision_tower)
    vocab_size = config.text_config.vocab_size
    tokenizer = load_tokenizer(resolve(language_model, with_weights=False), vocab_size)
    if tokenizer is None:
        raise CheckpointError(f"the language model {language_model} has no tokenizer files")
    config.image_token_id = free_row({"vocab_size": vocab_size}, tokenizer)
    processor = make_processor(config, image_processor(vision_tower, pad=False), tokenizer, template, language_model)
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, TEXT_LENGTH)
    return processor


def language_tokenizer(name: str, own_template: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of a language model, or a tokenizer alone, as a joined LLaVA gets it, but for the image's placeholder; with
    `own_template`, with its own chat template.

    Raises CheckpointError if there is none, DataError if the chat template is to be used and cannot be.
    """
    folder = resolve(name, with_weights=False)
    vocab_size = read_json(folder / "config.json").get("vocab_size") if (folder / "config.json").is_file() else None
    tokenizer = load_tokenizer(folder, vocab_size or sys.maxsize)
    if tokenizer is None:
        raise CheckpointError(f"{name} has no tokenizer files")
    if own_template:
        tokenizer.chat_template = make_portable(rendering.own_template(tokenizer), tokenizer, IMAGE_TOKEN)
    tokenizer.model_max_length = min(tokenizer.model_max_length, TEXT_LENGTH)
    return tokenizer


def join(
    language_model: str, vision_tower: str, template: str | None, seed: int, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """(dense LLaVA in evaluation mode, processor), with the weights of both and a projector that starts as torch's linear layers do, from
    `seed`. It takes the memory of the weights in `dtype`: they are not copied.

    Args: as `joined_processor`; `settings` go to `from_pretrained`.

    Raises CheckpointError as `joined_processor` does, or if weights are missing.
    """
    processor = joined_processor(language_model, vision_tower, template)
    config = joined_config(language_model, vision_tower)
    config.image_token_id = processor.image_token_id
    vocab_size = config.text_config.vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config).to(dtype)
    tower = load_tower(vision_tower, config.vision_config, dtype)
    state = _language_weights(language_model, config, dtype)
    state |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    state |= {f"model.multi_modal_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    model = assemble(LlavaForConditionalGeneration, config, state, dtype, **settings)
    model.generation_config = GenerationConfig(bos_token_id=processor.tokenizer.bos_token_id)
    set_token_ids(model.generation_config, config, processor, template, vocab_size)
    return model, processor


def language_config(name: str) -> tuple[PreTrainedConfig, Family | None]:
    """(configuration, family) of a language model. The family is that of a layout which transformers does not know: the Qwen of 2023; of
    all others it is None."""
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
    """Name in the LLaVA -> tensor, of a language model's backbone and head."""
    text, family = language_config(name)
    if family is not None:
        return _published_weights(name, family, config, dtype)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    model = load_strictly(model_class, name, text, f"the language model {name}", dtype=dtype)
    state = {_BACKBONE + key: tensor for key, tensor in model.base_model.state_dict().items()}
    return state if config.tie_word_embeddings else state | {f"{_HEAD}weight": model.get_output_embeddings().weight.data}


def _published_weights(name: str, family: Family, config: LlavaConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same, of a layout that the tables know."""
    folder = resolve(name, with_weights=True)
    tables = read_tables(find_weights(folder))
    for names in layout.unused(tables).values():
        for key in names:
            del tables[key]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(config)
    pieces = [piece for piece in layout.plan(model, family) if piece.target.startswith((_BACKBONE, _HEAD))]
    layout.check(pieces, tables, model, str(folder))
    return layout.read(pieces, tables, model, dtype)
