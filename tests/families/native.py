"""Tiny models of families whose layers have experts of their own, with random weights, and their processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from tests.families.processors import CHATML, PATCHES, ROWS, Row, chatml, ids_of, made_processor
from tests.vlm import CLIP, END, IMAGE, MROPE, QWEN_TOWER, START, TEXT, VIDEO, random_vlm

GLM_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END}
GLM_IDS |= {"video_start_token_id": START, "video_end_token_id": END}
ERNIE = {"image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>", "image_end_token": "<|IMAGE_END|>"}
ERNIE |= {"video_token": "<|VIDEO_PLACEHOLDER|>", "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>"}

PROCESSORS = {
    "qwen3_vl_moe": ROWS["qwen3_vl"],
    "glm4v_moe": ROWS["glm4v"],
    "aria": Row(
        "AriaProcessor",
        ("AriaImageProcessor", {"min_image_size": 980}),
        chatml("<|img|>"),
        CHATML,
        {"image_token": "<|img|>"},
        settings={"size_conversion": {980: 5}},
    ),
    "ernie4_5_vl_moe": Row(
        "Ernie4_5_VLMoeProcessor",
        ("Ernie4_5_VLMoeImageProcessor", PATCHES),
        chatml("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
        CHATML,
        ERNIE,
        videos=("Ernie4_5_VLMoeVideoProcessor", PATCHES | {"draw_on_frames": False}),
    ),
}
# The settings of the configuration, and those of its language model. The first layer of GLM and ERNIE is dense.
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl_moe": (
        {
            "vision_config": QWEN_TOWER | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
        },
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "rope_parameters": MROPE},
    ),
    "glm4v_moe": (
        {"vision_config": QWEN_TOWER | {"image_size": 16}, **GLM_IDS},
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "rope_parameters": MROPE | {"partial_rotary_factor": 1.0, "mrope_interleaved": False},
        },
    ),
    "aria": (
        {
            "vision_config": CLIP | {"model_type": "idefics3_vision", "image_size": 980, "patch_size": 196},
            "image_token_index": IMAGE,
            "projector_patch_to_query_dict": {25: 5},
        },
        {"model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 2},
    ),
    "ernie4_5_vl_moe": (
        {"vision_config": QWEN_TOWER, **GLM_IDS},
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": [16, 8],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
    ),
}
SPARSE = {"qwen3_vl_moe": (0, 1, 2, 3), "glm4v_moe": (1, 2, 3), "aria": (0, 1, 2, 3), "ernie4_5_vl_moe": (1, 2, 3)}


def native_processor(family: str) -> Any:
    """Return the processor of `family`."""
    return made_processor(PROCESSORS[family])


def native_model(family: str, processor: Any) -> PreTrainedModel:
    """Return a model of `family` that fits `processor`."""
    settings, text = CONFIGS[family]
    config = AutoConfig.for_model(family, text_config=TEXT | text, **settings)
    return random_vlm(config, ids=ids_of(processor), vocab_size=len(processor.tokenizer))


def native_checkpoint(family: str, folder: Path) -> Path:
    """Save a model of `family` and its processor in `folder`."""
    processor = native_processor(family)
    native_model(family, processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
