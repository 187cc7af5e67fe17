"""Convert a published checkpoint to a folder with model, processor, tokenizer, chat template and generation settings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from moe_llava.checkpoints.processors import image_processor, make_processor, set_token_ids
from moe_llava.checkpoints.published import Published, inspect_published
from moe_llava.checkpoints.tokenization import highest_id, load_tokenizer
from moe_llava.common.errors import CheckpointError
from moe_llava.common.files import new_folder
from moe_llava.data.templates import IMAGE_TOKEN
from moe_llava.model import MoeLlavaConfig


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
