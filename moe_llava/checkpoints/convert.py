"""A published checkpoint becomes a folder of ours: model, processor, tokenizer, chat template, generation settings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from moe_llava.checkpoints.processors import image_processor, make_processor, set_token_ids
from moe_llava.checkpoints.published import Published, look_at
from moe_llava.checkpoints.tokenization import highest_id, load_tokenizer
from moe_llava.common.errors import CheckpointError
from moe_llava.common.files import new_folder
from moe_llava.data.templates import IMAGE_TOKEN
from moe_llava.model import MoeLlavaConfig


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
        images = image_processor(published.tower, pad=published.settings.get("image_aspect_ratio") == "pad")
        tokenizer = load_tokenizer(published.language_model, published.settings["vocab_size"])
        processor = None
        if tokenizer is not None:
            template = template_name(published, tokenizer)
            image = image_form(published, tokenizer)
            processor = make_processor(published.config, images, tokenizer, template, str(published.language_model), image)
        model = published.load()
        if processor is None:
            images.save_pretrained(folder)
        else:
            model.config.image_token_id = processor.image_token_id
            set_token_ids(model.generation_config, model.config, processor, template, published.settings["vocab_size"])
            processor.save_pretrained(folder)
        model.save_pretrained(folder)
    return _summary(published, model, tokenizer)


def image_form(published: Published, tokenizer: PreTrainedTokenizerFast) -> str:
    """What stands for an image in a text. Raises CheckpointError if the tokenizer does not know the tokens around it."""
    if not published.settings.get("mm_use_im_start_end"):
        return IMAGE_TOKEN
    if not {"<im_start>", "<im_end>"} <= tokenizer.get_vocab().keys():
        raise CheckpointError(
            f"{published.folder / 'config.json'} has mm_use_im_start_end, but the tokenizer does not know <im_start> and <im_end>"
        )
    return f"<im_start>{IMAGE_TOKEN}<im_end>"


def template_name(published: Published, tokenizer: PreTrainedTokenizerFast) -> str:
    for token, name in published.family.templates_by_token.items():
        if token in tokenizer.get_vocab():
            return name
    return published.family.template


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
