"""Processors: a tower's preprocessing and a tokenizer, put together for a LLaVA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlavaConfig, LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from moe_llava.checkpoints.families import TOWERS
from moe_llava.checkpoints.settings import extra_tokens, no_tokens
from moe_llava.checkpoints.tokenization import add_placeholder, highest_id
from moe_llava.common.errors import CheckpointError
from moe_llava.data.answers import end_of_turn
from moe_llava.data.rendering import make_portable, own_template
from moe_llava.data.templates import IMAGE_TOKEN, TEMPLATES, chat_template
from moe_llava.model import MoeLlavaConfig, MoeLlavaProcessor

# What tells how many placeholders an image gets.
FEATURE_SETTINGS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


def image_processor(tower: str, pad: bool) -> LlavaImageProcessorPil:
    """The preprocessing of a tower (folder or hub id); with `pad`, after padding to a square with the tower's mean colour.

    Raises CheckpointError if the tower comes without it.
    """
    try:
        settings, _ = LlavaImageProcessorPil.get_image_processor_dict(tower)
    except OSError as error:
        raise CheckpointError(f"the vision tower {tower} has no preprocessor_config.json") from error
    return LlavaImageProcessorPil.from_pretrained(
        tower,
        do_pad=pad,
        do_center_crop=settings.get("do_center_crop", False),  # SigLIP's file does not mention it
    )


def make_processor(
    config: LlavaConfig,
    images: LlavaImageProcessorPil,
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    source: str,
    image: str = IMAGE_TOKEN,
) -> LlavaProcessor:
    """Images and text to the inputs of a model with `config`.

    Args:
        template: the conversation form of its chat template, a key of TEMPLATES; None keeps the tokenizer's own.
        source: where the tokenizer is from, for errors.
        image: what stands for an image in a text of that form.

    Raises CheckpointError if the tokenizer does not know what ends an answer in that form, or has no chat template of its own.
    """
    if template is not None and TEMPLATES[template].end.strip() not in tokenizer.get_vocab():
        raise CheckpointError(
            f"the tokenizer in {source} does not know {TEMPLATES[template].end}, which ends an answer in the conversation form {template!r}"
        )
    if template is None and not tokenizer.chat_template:
        raise CheckpointError(f"the tokenizer in {source} has no chat template: name a conversation form, one of {', '.join(TEMPLATES)}")
    jinja = make_portable(own_template(tokenizer) if template is None else chat_template(template, image), tokenizer, IMAGE_TOKEN)
    image_token_id = config.image_token_id
    if isinstance(config, MoeLlavaConfig):
        image_token_id = max(image_token_id, highest_id(tokenizer) + 1)
    tokenizer = add_placeholder(tokenizer, image_token_id, jinja)
    arguments: dict[str, Any] = {
        "image_processor": images,
        "tokenizer": tokenizer,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": extra_tokens(config.vision_config),
        "chat_template": tokenizer.chat_template,
    }
    return MoeLlavaProcessor(**arguments) if isinstance(config, MoeLlavaConfig) else LlavaProcessor(**arguments)


def complete_processor(processor: Any, config: LlavaConfig, path: str | Path) -> None:
    """Take from `config` what the files of a LlavaProcessor, loaded from `path`, do not say, and make its tokenizer pad on the left.

    Raises CheckpointError if that cannot be known, or if what the files say gives an image other features than the model makes.
    """
    tokenizer = processor.tokenizer
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # only what is among the latter is saved
    if not isinstance(processor, LlavaProcessor):
        return
    said, _ = type(processor).get_processor_dict(path)
    _complete_features(processor, config, said)
    if said.get("image_token") is None and processor.image_token not in tokenizer.get_vocab():
        token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        if token is None:
            raise CheckpointError(
                f"it does not say its image_token, and no token has the image_token_id {config.image_token_id} of config.json"
            )
        processor.image_token, processor.image_token_id = token, config.image_token_id


def _complete_features(processor: LlavaProcessor, config: LlavaConfig, said: dict[str, Any]) -> None:
    """The same for the settings that tell how many placeholders an image gets. Only of the known towers, the configuration tells them."""
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    lacking = [name for name in FEATURE_SETTINGS if said.get(name) is None]
    if vision.model_type not in TOWERS:
        if lacking:
            raise CheckpointError(f"it does not say {', '.join(lacking)}, and a tower of the type {vision.model_type!r} is not known")
        return
    if lacking:
        lacking.append("num_additional_image_tokens")  # of which older versions wrote their default, 0, and never asked for it
    for name, value in zip(FEATURE_SETTINGS, (vision.patch_size, strategy, extra_tokens(vision)), strict=True):
        if name in lacking:
            setattr(processor, name, value)
    number = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    if (processor.patch_size, number) != (vision.patch_size, extra_tokens(vision) - (strategy == "default")):
        found = ", ".join(f"{name} {getattr(processor, name)!r}" for name in FEATURE_SETTINGS)
        raise CheckpointError(
            f"it has {found}, but by its config.json they are {vision.patch_size}, {strategy!r}, {extra_tokens(vision)}: "
            "an image would get another number of placeholders than it has features"
        )


def with_portable_template(processor: LlavaProcessor) -> LlavaProcessor:
    """The same processor, whose chat template takes strings and lists of parts, in the processor and in its tokenizer."""
    source = processor if processor.chat_template else processor.tokenizer
    if source.chat_template:
        jinja = make_portable(own_template(source), processor.tokenizer, processor.image_token)
        processor.chat_template = processor.tokenizer.chat_template = jinja
    return processor


def set_token_ids(
    generation: GenerationConfig, config: LlavaConfig, processor: LlavaProcessor, template: str | None, vocab_size: int
) -> None:
    """Which ids end an answer (the tokenizer's end of text, and what ends an answer in the form `template`, or in the processor's chat
    template), pad, and are never generated. `vocab_size`: of the language model as it was published."""
    tokenizer = processor.tokenizer
    end = end_of_turn(tokenizer, tokenizer.chat_template) if template is None else TEMPLATES[template].end
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get(end.strip())} - {None}
    generation.eos_token_id = sorted(token for token in ends if token < vocab_size) or generation.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    generation.suppress_tokens = no_tokens(config, vocab_size)
