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
from moe_llava.digits.scenes import CANVAS
from moe_llava.digits.tokenizer import build_tokenizer

WEIGHTS = Path(__file__).parent / "weights"


def build_base(seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return (dense LLaVA in float32, processor): the shipped tower and language model, with a projector initialised from the seed."""
    tower, language_model = (
        load_strictly(kind, folder, kind.config_class.from_pretrained(folder), str(folder), dtype=torch.float32)
        for kind, folder in ((CLIPVisionModel, WEIGHTS / "tower"), (LlamaForCausalLM, WEIGHTS / "language_model"))
    )
    tokenizer = build_tokenizer()
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(CANVAS // tower.config.patch_size) ** 2,
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
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy "default" removes
        chat_template=tokenizer.chat_template,
    )
    return model, processor


def image_processor() -> LlavaImageProcessorPil:
    """Return a processor that pads to a square, resizes to the canvas and scales to -1..1."""
    return LlavaImageProcessorPil(
        do_pad=True,
        size={"height": CANVAS, "width": CANVAS},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def pixel_values(images: list[Image.Image]) -> Tensor:
    """Return [B, 3, CANVAS, CANVAS] of pictures of that size: the output of `image_processor`, without its overhead."""
    pixels_BHWC = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (pixels_BHWC.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
