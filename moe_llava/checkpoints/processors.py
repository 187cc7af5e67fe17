"""Build the processor of a LLaVA from a tower's preprocessing and a tokenizer, and complete those of older checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from transformers import GenerationConfig, LlavaConfig, LlavaImageProcessorPil, LlavaProcessor, PreTrainedConfig, PreTrainedTokenizerFast

from moe_llava.checkpoints.settings import no_tokens
from moe_llava.checkpoints.tokenization import add_placeholder, highest_id
from moe_llava.checkpoints.towers import extra_tokens
from moe_llava.common.errors import CheckpointError
from moe_llava.data.answers import end_of_turn
from moe_llava.data.rendering import make_portable, own_template
from moe_llava.data.templates import IMAGE_TOKEN, TEMPLATES, chat_template
from moe_llava.model import MoeLlavaConfig, MoeLlavaProcessor

# They determine the number of placeholders of an image.
FEATURE_SETTINGS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


def image_processor(tower: str, pad: bool) -> LlavaImageProcessorPil:
    """Return the preprocessing of a tower (folder or hub id); with `pad`, images are first padded to a square with the tower's mean colour.

    Raises CheckpointError if the tower has none.
    """
    try:
        settings, _ = LlavaImageProcessorPil.get_image_processor_dict(tower)
    except OSError as error:
        raise CheckpointError(f"the vision tower {tower} has no preprocessor_config.json") from error
    crop, size = settings.get("do_center_crop", False), settings.get("size")  # SigLIP's file does not mention a crop
    square = {"size": {"height": size, "width": size}} if isinstance(size, int) and not crop else {}  # in older files, as of ViT
    return LlavaImageProcessorPil.from_pretrained(tower, do_pad=pad, do_center_crop=crop, **square)


def pixel_size(images: LlavaImageProcessorPil, tower: str) -> tuple[int, int]:
    """Return (height, width) of what `images` makes of an image. Raises CheckpointError if it depends on the image."""
    found = {images(Image.new("RGB", size), return_tensors="np")["pixel_values"].shape[-2:] for size in ((64, 48), (48, 64))}
    if len(found) > 1:
        sizes = " and ".join(f"{height} x {width}" for height, width in sorted(found))
        raise CheckpointError(f"the preprocessing of the vision tower {tower} makes images of several sizes, such as {sizes} pixels")
    height, width = found.pop()
    return int(height), int(width)


def resize_images(images: LlavaImageProcessorPil, side: int, tower: str) -> None:
    """Make `images` return squares of `side` pixels: what is cropped is resized in the same proportion as before.

    Raises CheckpointError if the size of what it returns depends on the image, or is no square.
    """
    height, width = pixel_size(images, tower)
    if height != width:
        raise CheckpointError(
            f"the preprocessing of the vision tower {tower} makes images of {height} x {width} pixels: no square to resize"
        )
    for name in ("size", "crop_size"):
        if numbers := getattr(images, name, None):
            setattr(images, name, {key: round(number * side / height) for key, number in dict(numbers).items() if number})


def make_processor(
    config: LlavaConfig,
    images: LlavaImageProcessorPil,
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    source: str,
    image: str = IMAGE_TOKEN,
) -> LlavaProcessor:
    """Return the processor for a model with `config`.

    Args:
        template: its chat template, a key of TEMPLATES; None for the tokenizer's own.
        source: the tokenizer's folder, for errors.
        image: the text of an image in that template.

    Raises CheckpointError if the tokenizer does not know what ends an answer in that template, or has no chat template of its own.
    """
    if template is not None and TEMPLATES[template].end.strip() not in tokenizer.get_vocab():
        raise CheckpointError(
            f"the tokenizer in {source} does not know {TEMPLATES[template].end}, which ends an answer in the chat template {template!r}"
        )
    if template is None and not tokenizer.chat_template:
        raise CheckpointError(f"the tokenizer in {source} has no chat template: name one of {', '.join(TEMPLATES)}")
    jinja = make_portable(own_template(tokenizer) if template is None else chat_template(template, image), tokenizer, IMAGE_TOKEN)
    sparse, image_token_id = isinstance(config, MoeLlavaConfig), config.image_token_id
    tokenizer = add_placeholder(tokenizer, max(image_token_id, highest_id(tokenizer) + 1) if sparse else image_token_id, jinja)
    return (MoeLlavaProcessor if sparse else LlavaProcessor)(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=extra_tokens(config.vision_config),
        chat_template=tokenizer.chat_template,
    )


def sparse_processor(processor: Any) -> Any:
    """Return the processor of the sparse model that is made from the dense one of `processor`: the same, but for a LLaVA."""
    return MoeLlavaProcessor.from_llava(processor) if isinstance(processor, LlavaProcessor) else processor


def dense_processor(processor: Any) -> Any:
    """Return the processor of a sparse model's dense origin."""
    return processor.to_llava() if isinstance(processor, MoeLlavaProcessor) else processor


def complete_processor(processor: Any, config: PreTrainedConfig, path: str | Path) -> None:
    """Make the tokenizer of a processor pad on the left, and its chat template take strings and lists of parts. Take from `config` what the
    files in `path` of a LlavaProcessor lack.

    Raises CheckpointError if it is no processor of images and text, if something is unknown, or if an image would get another number of
    placeholders than the model has features.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_token", None) is None:
        raise CheckpointError(f"it is a {type(processor).__name__}, which does not put images into a text")
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # only the latter is saved
    if isinstance(processor, LlavaProcessor) and isinstance(config, LlavaConfig):
        stored, _ = type(processor).get_processor_dict(path)
        _complete_features(processor, config, stored)
        if stored.get("image_token") is None and processor.image_token not in tokenizer.get_vocab():
            token = tokenizer.convert_ids_to_tokens(config.image_token_id)
            if token is None:
                raise CheckpointError(f"it lacks image_token, and no token has the image_token_id {config.image_token_id} of config.json")
            processor.image_token, processor.image_token_id = token, config.image_token_id
    source = processor if processor.chat_template else tokenizer
    if source.chat_template:
        processor.chat_template = tokenizer.chat_template = make_portable(own_template(source), tokenizer, processor.image_token)


def _complete_features(processor: LlavaProcessor, config: LlavaConfig, stored: dict[str, Any]) -> None:
    """Take the FEATURE_SETTINGS from the configuration, which has them for the known towers."""
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    missing = [name for name in FEATURE_SETTINGS if stored.get(name) is None]
    try:
        extra = extra_tokens(vision)
    except CheckpointError as error:
        if missing:
            raise CheckpointError(f"it lacks {', '.join(missing)}, and the tower's features are not known: {error}") from error
        return
    if missing:
        missing.append("num_additional_image_tokens")  # older versions wrote their default, 0, without using it
    for name, value in zip(FEATURE_SETTINGS, (vision.patch_size, strategy, extra), strict=True):
        if name in missing:
            setattr(processor, name, value)
    number = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    if (processor.patch_size, number) != (vision.patch_size, extra - (strategy == "default")):
        found = ", ".join(f"{name} {getattr(processor, name)!r}" for name in FEATURE_SETTINGS)
        raise CheckpointError(
            f"it has {found}, but by its config.json they are {vision.patch_size}, {strategy!r}, {extra}: "
            "an image would get another number of placeholders than it has features"
        )


def set_token_ids(
    generation: GenerationConfig, config: LlavaConfig, processor: LlavaProcessor, template: str | None, vocab_size: int
) -> None:
    """Set the ids that end an answer, that pad, and that are never generated. An answer ends with the tokenizer's end of text, or with what
    ends it in the chat template, named or the processor's. `vocab_size`: that of the language model as it was published."""
    tokenizer = processor.tokenizer
    end = end_of_turn(tokenizer, tokenizer.chat_template) if template is None else TEMPLATES[template].end
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get(end.strip())} - {None}
    generation.eos_token_id = sorted(token for token in ends if token < vocab_size) or generation.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    generation.suppress_tokens = no_tokens(config, vocab_size)
