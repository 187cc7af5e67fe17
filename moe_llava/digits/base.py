"""The dense LLaVA that the digits world starts from: pretrained tower, pretrained language model, untrained projector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from moe_llava.checkpoints.load import load_strictly
from moe_llava.common.errors import CheckpointError
from moe_llava.digits.scenes import STANDARD, Level
from moe_llava.digits.tokenizer import build_tokenizer

WEIGHTS = Path(__file__).parent / "weights"


def build_base(
    seed: int = 0, level: Level = STANDARD, tower_folder: Path = WEIGHTS / "tower", text_folder: Path = WEIGHTS / "language_model"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return (dense LLaVA in float32, processor): a tower and a language model, by default the shipped ones, with a projector initialised
    from the seed.

    Raise CheckpointError if one of the two was not pretrained for the level.
    """
    tokenizer = build_tokenizer(level)
    vision, text = CLIPVisionModel.config_class.from_pretrained(tower_folder), LlamaForCausalLM.config_class.from_pretrained(text_folder)
    for folder, key, found, needed in (
        (tower_folder, "image_size", vision.image_size, level.canvas),
        (text_folder, "vocab_size", text.vocab_size, len(tokenizer)),
    ):
        if found != needed:
            raise CheckpointError(f"{folder} has {key} {found}, but the level {level.name} of the digits world needs {needed}")
    tower = load_strictly(CLIPVisionModel, tower_folder, vision, str(tower_folder), dtype=torch.float32)
    language_model = load_strictly(LlamaForCausalLM, text_folder, text, str(text_folder), dtype=torch.float32)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(level.canvas // tower.config.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    model.generation_config = language_model.generation_config
    processor = LlavaProcessor(
        image_processor=image_processor(level),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy "default" removes
        chat_template=tokenizer.chat_template,
    )
    return model, processor


def image_processor(level: Level = STANDARD) -> LlavaImageProcessorPil:
    """Return a processor that pads to a square, resizes to the level's canvas and scales to -1..1."""
    return LlavaImageProcessorPil(
        do_pad=True,
        size={"height": level.canvas, "width": level.canvas},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def pixel_values(images: list[Image.Image]) -> Tensor:
    """Return [B, 3, SIDE, SIDE] of pictures of one level: the output of `image_processor`, without its overhead."""
    pixels_BHWC = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (pixels_BHWC.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
