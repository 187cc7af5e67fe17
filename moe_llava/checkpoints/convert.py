"""A published checkpoint becomes a folder of ours: model, processor, tokenizer, chat template, generation settings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from transformers import LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from moe_llava.checkpoints.errors import CheckpointError
from moe_llava.checkpoints.folders import new_folder
from moe_llava.checkpoints.published import Published, look_at, no_tokens
from moe_llava.checkpoints.settings import extra_tokens
from moe_llava.checkpoints.tokenization import add_placeholder, highest_id, load_tokenizer
from moe_llava.data.templates import IMAGE_TOKEN, TEMPLATES, chat_template
from moe_llava.model import MoeLlavaConfig, MoeLlavaProcessor


def convert(path: str | Path, out: Path, vision_towers: str | Path | None = None, language_model: str | Path | None = None) -> list[str]:
    """Writes `out`, a new folder that `from_pretrained` and `pipeline` take; returns what there is to say about it, line by line.

    A checkpoint without a tokenizer makes a folder without one: a model with its image processor.

    Args: as `load_published`.

    Raises CheckpointError as `load_published` does, or FileExistsError if `out` exists; then nothing is left behind.
    """
    with new_folder(out) as folder:
        published = look_at(path, vision_towers, language_model)
        if published.language_model is None:
            raise CheckpointError(f"{path} holds a projector alone: name the language model that it was trained with (--language-model)")
        images = image_processor(published)
        tokenizer = load_tokenizer(published.language_model, published.settings["vocab_size"])
        processor = None if tokenizer is None else make_processor(published, images, tokenizer)
        model = published.load()
        if processor is None:
            images.save_pretrained(folder)
        else:
            model.config.image_token_id = processor.image_token_id
            model.generation_config.suppress_tokens = no_tokens(model.config, published.settings)
            generation = model.generation_config
            generation.eos_token_id = end_ids(published, processor.tokenizer) or generation.eos_token_id
            generation.pad_token_id = processor.tokenizer.pad_token_id
            processor.save_pretrained(folder)
        model.save_pretrained(folder)
    return _summary(published, model, tokenizer)


def image_processor(published: Published) -> LlavaImageProcessorPil:
    """The tower's own preprocessing, after padding to a square if the model was trained so.

    Raises CheckpointError if the tower comes without it.
    """
    try:
        settings, _ = LlavaImageProcessorPil.get_image_processor_dict(published.tower)
    except OSError as error:
        raise CheckpointError(f"the vision tower {published.tower} has no preprocessor_config.json") from error
    return LlavaImageProcessorPil.from_pretrained(
        published.tower,
        do_pad=published.settings.get("image_aspect_ratio") == "pad",
        do_center_crop=settings.get("do_center_crop", False),  # SigLIP's file does not mention it
    )


def make_processor(published: Published, images: LlavaImageProcessorPil, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Images and text to model inputs, with the chat template that the model was trained with.

    Raises CheckpointError if the tokenizer does not know what ends an answer in that template.
    """
    template = template_name(published, tokenizer)
    if TEMPLATES[template].end not in tokenizer.get_vocab():
        raise CheckpointError(
            f"the tokenizer in {published.language_model} does not know {TEMPLATES[template].end}, "
            f"which ends an answer in the conversation form {template!r}"
        )
    wrapped = IMAGE_TOKEN
    if published.settings.get("mm_use_im_start_end"):
        wrapped = f"<im_start>{IMAGE_TOKEN}<im_end>"
        if not {"<im_start>", "<im_end>"} <= tokenizer.get_vocab().keys():
            raise CheckpointError(
                f"{published.folder / 'config.json'} has mm_use_im_start_end, but the tokenizer does not know <im_start> and <im_end>"
            )
    image_token_id = published.config.image_token_id
    if isinstance(published.config, MoeLlavaConfig):
        image_token_id = max(image_token_id, highest_id(tokenizer) + 1)
    tokenizer = add_placeholder(tokenizer, image_token_id, chat_template(template, wrapped))
    vision_config = published.config.vision_config
    arguments: dict[str, Any] = {
        "image_processor": images,
        "tokenizer": tokenizer,
        "patch_size": vision_config.patch_size,
        "vision_feature_select_strategy": published.config.vision_feature_select_strategy,
        "num_additional_image_tokens": extra_tokens(vision_config),
        "chat_template": tokenizer.chat_template,
    }
    return MoeLlavaProcessor(**arguments) if isinstance(published.config, MoeLlavaConfig) else LlavaProcessor(**arguments)


def template_name(published: Published, tokenizer: PreTrainedTokenizerFast) -> str:
    for token, name in published.family.templates_by_token.items():
        if token in tokenizer.get_vocab():
            return name
    return published.family.template


def end_ids(published: Published, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Where an answer ends, of what the vocabulary has: the tokenizer's end of text, and what ends an answer in the template."""
    end = TEMPLATES[template_name(published, tokenizer)].end
    ids = {tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id} - {None}
    return sorted(token for token in ids if token < published.settings["vocab_size"])


def _summary(published: Published, model: Any, tokenizer: PreTrainedTokenizerFast | None) -> list[str]:
    config = model.config
    lines = [f"{published.settings['model_type']}: {model.num_parameters():,} parameters in {str(model.dtype).removeprefix('torch.')}"]
    if isinstance(config, MoeLlavaConfig):
        lines.append(
            f"experts: {config.num_experts}, of which a token uses {config.num_experts_per_tok}, in layers {config.moe_layer_indices}"
        )
    tables, unused = published.tables
    for reason, names in unused.items():
        lines.append(f"not used, {reason}: {', '.join(names)}")
    others = Counter(stored.dtype for stored in tables.values() if stored.dtype != model.dtype)
    lines += [f"converted from {str(dtype).removeprefix('torch.')}: {number} of {len(tables)} tensors" for dtype, number in others.items()]
    vocab_size = published.settings["vocab_size"]
    if tokenizer is None:
        lines.append(f"no tokenizer: {published.language_model} has none, so the folder holds the model and its image processor alone")
    elif highest_id(tokenizer) >= vocab_size:
        lines.append(
            f"warning: the tokenizer has ids up to {highest_id(tokenizer)}, but the model's vocabulary ends at {vocab_size - 1}: "
            "they do not belong together, and a text with the ids beyond is an error"
        )
    return lines
