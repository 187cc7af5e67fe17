"""Tiny vision-language models of several families, with random weights, made from each family's own configuration, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

IMAGE, VIDEO, START, END = 90, 91, 92, 93  # token ids; the vocabulary ends at 98
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large weights, so that a mistake shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
QWEN_TOWER = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "mrope_interleaved": True}


def images(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return images of 16 x 16 pixels."""
    return {"pixel_values": torch.randn(number, 3, 16, 16, generator=generator)}


def sized(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return images with their sizes in pixels."""
    return images(number, generator) | {"image_sizes": torch.tensor([[16, 16]] * number)}


def anyres(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return images of 16 x 16 pixels, each as a whole and as its only tile, whose rows end with a newline feature."""
    return {"pixel_values": torch.randn(number, 2, 3, 16, 16, generator=generator), "image_sizes": torch.tensor([[16, 16]] * number)}


def positioned(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return images of 4 x 4 flattened patches of 4 x 4 pixels, with the positions of the patches."""
    positions = torch.tensor([[column, row] for row in range(4) for column in range(4)])
    return {"pixel_values": torch.rand(number, 16, 48, generator=generator), "image_position_ids": positions.expand(number, 16, 2)}


def tiles(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return images of one tile each."""
    return {"pixel_values": torch.randn(number, 1, 3, 16, 16, generator=generator)}


def patches(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return images of 4 x 4 flattened patches of 4 x 4 pixels, with their grids."""
    return {"pixel_values": torch.randn(16 * number, 3 * 2 * 16, generator=generator), "image_grid_thw": torch.tensor([[1, 4, 4]] * number)}


@dataclass(frozen=True)
class Family:
    """A tiny model. `features`: placeholders of an image; `around`: the tokens before and after them; `make`: pixel values of a number of
    images; `types`: the argument that marks image tokens with 1."""

    settings: dict[str, Any]
    text: dict[str, Any] = field(default_factory=lambda: {"model_type": "llama"})
    features: int = 4
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    make: Callable[[int, torch.Generator], dict[str, Tensor]] = images
    types: str | None = None


FAMILIES = {
    "llava": Family({"vision_config": CLIP | {"model_type": "clip_vision_model"}, "image_token_index": IMAGE}),
    "qwen2_5_vl": Family(
        {"vision_config": QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [1]}, **QWEN_IDS},
        text={"rope_parameters": MROPE},
        around=((START,), (END,)),
        make=patches,
        types="mm_token_type_ids",
    ),
    "qwen3_vl": Family(
        {"vision_config": QWEN_TOWER | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}, **QWEN_IDS},
        text={"rope_parameters": MROPE},
        around=((START,), (END,)),
        make=patches,
        types="mm_token_type_ids",
    ),
    "gemma3": Family(
        {"vision_config": SIGLIP, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END, "mm_tokens_per_image": 4},
        text={"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 8},
        types="token_type_ids",
    ),
    "paligemma": Family(
        {"vision_config": SIGLIP, "image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32},
        text={"model_type": "gemma"},
        types="token_type_ids",
    ),
    "internvl": Family(
        {
            "vision_config": CLIP | {"image_size": [16, 16], "patch_size": [4, 4]},
            "image_token_id": IMAGE,
            "downsample_ratio": 0.5,
        },
        text={"model_type": "qwen3"},
    ),
    "smolvlm": Family({"vision_config": CLIP | {"patch_size": 4}, "image_token_id": IMAGE, "scale_factor": 2}, make=tiles),
    "idefics3": Family({"vision_config": CLIP | {"patch_size": 4}, "image_token_id": IMAGE, "scale_factor": 2}, make=tiles),
    "vipllava": Family(
        {"vision_config": CLIP | {"model_type": "clip_vision_model"}, "image_token_index": IMAGE, "vision_feature_layer": [-1, -2]}
    ),
    "qwen3_5": Family(
        {"vision_config": QWEN_TOWER | {"num_position_embeddings": 16}, **QWEN_IDS},
        text={
            "rope_parameters": MROPE,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        around=((START,), (END,)),
        make=patches,
        types="mm_token_type_ids",
    ),
    "glm4v": Family(
        {
            "vision_config": QWEN_TOWER | {"image_size": 16, "out_hidden_size": 32, "intermediate_size": 32},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_start_token_id": START,
            "image_end_token_id": END,
            "video_start_token_id": 94,
            "video_end_token_id": 95,
        },
        text={"rope_parameters": MROPE | {"partial_rotary_factor": 1.0, "mrope_interleaved": False}},
        around=((START,), (END,)),
        make=patches,
        types="mm_token_type_ids",
    ),
    "aya_vision": Family(
        {"vision_config": SIGLIP | {"patch_size": 4}, "image_token_index": IMAGE, "downsample_factor": 2, "adapter_hidden_size": 64},
        text={"model_type": "cohere2", "sliding_window": 8},
    ),
    "mistral3": Family(
        {
            "vision_config": CLIP | {"model_type": "pixtral", "patch_size": 4, "head_dim": 8},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
        },
        text={"model_type": "mistral"},
        make=sized,
    ),
    "llava_next": Family(
        {
            "vision_config": CLIP | {"model_type": "clip_vision_model"},
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]],
        },
        features=10,
        make=anyres,
    ),
    "llava_onevision": Family(
        {
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]],
        },
        text={"model_type": "qwen2"},
        features=10,
        make=anyres,
    ),
    "ovis2": Family(
        {
            "vision_config": CLIP | {"hidden_stride": 1, "vocab_size": 32, "num_visual_indicator_tokens": 5},
            "image_token_id": IMAGE,
            "visual_indicator_token_ids": [84, 85, 86, 87, 88],
            "vocab_size": 99,
            "hidden_size": 32,
        },
        text={"model_type": "qwen2"},
    ),
    "gemma4": Family(
        {
            "vision_config": CLIP | {"patch_size": 4, "head_dim": 8, "num_key_value_heads": 2, "pooling_kernel_size": 2},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "boi_token_id": START,
            "eoi_token_id": END,
            "audio_token_id": 94,
        },
        text={
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 99,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "global_head_dim": 8,
        },
        make=positioned,
        types="mm_token_type_ids",
    ),
    "cohere2_vision": Family(
        {
            "vision_config": SIGLIP | {"patch_size": 4},
            "image_token_id": IMAGE,
            "downsample_factor": 2,
            "alignment_intermediate_size": 64,
        },
        text={"model_type": "cohere2", "sliding_window": 8},
    ),
}


def tiny_vlm(family: str, seed: int = 0, ids: dict[int, int] | None = None, vocab_size: int = TEXT["vocab_size"]) -> PreTrainedModel:
    """Return a dense model of `family` with random weights, in evaluation mode. `ids` replaces token ids of the settings."""
    row = FAMILIES[family]
    return random_vlm(AutoConfig.for_model(family, text_config=TEXT | row.text, **row.settings), seed, ids, vocab_size)


def random_vlm(config: PreTrainedConfig, seed: int = 0, ids: dict[int, int] | None = None, vocab_size: int = 0) -> PreTrainedModel:
    """Return a model with random weights, in evaluation mode. With `ids`, which replaces token ids, it has `vocab_size` tokens."""
    torch.manual_seed(seed)
    if ids:
        config = type(config).from_dict(_with_ids(config.to_dict(), ids, vocab_size))
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def _with_ids(settings: dict[str, Any], ids: dict[int, int], vocab_size: int) -> dict[str, Any]:
    """Replace token ids, and the size of the text's vocabulary, wherever a configuration has them."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found[name] = _with_ids(value, ids, vocab_size)
        elif str(name).startswith("vocab_size") and value == TEXT["vocab_size"]:
            found[name] = vocab_size
        elif "token_id" in str(name) or "token_index" in str(name):
            found[name] = [ids.get(id, id) for id in value] if isinstance(value, list) else ids.get(value, value)
        else:
            found[name] = value
    return found


def vlm_inputs(family: str, images: Sequence[int] = (1, 1), side: str = "left", seed: int = 1) -> dict[str, Tensor]:
    """Return a batch, padded on `side`: a row for each number of images, which follow each other, and text of another length."""
    row, generator = FAMILIES[family], torch.Generator().manual_seed(seed)
    before, after = row.around
    prompts = []
    for index, number in enumerate(images):
        text = torch.randint(3, 80, (5 + 2 * index,), generator=generator).tolist()
        prompts.append([1, text[0], *[*before, *[IMAGE] * row.features, *after] * number, *text[1:]])
    length = max(map(len, prompts))

    def padded(tokens: list[int], padding: int) -> list[int]:
        missing = [padding] * (length - len(tokens))
        return missing + tokens if side == "left" else tokens + missing

    ids = torch.tensor([padded(prompt, 0) for prompt in prompts])
    found = {"input_ids": ids, "attention_mask": torch.tensor([padded([1] * len(prompt), 0) for prompt in prompts])}
    if row.types:
        found[row.types] = (ids == IMAGE).long()
    if not any(images):
        return found
    made = row.make(sum(images), generator)
    return found | (by_row(made, images) if row.make is tiles else made)


def by_row(made: dict[str, Tensor], images: Sequence[int]) -> dict[str, Tensor]:
    """Return images arranged by the rows of a batch, and filled up with empty ones, which families of tiles leave out."""
    pixels = torch.zeros(len(images), max(images), *made["pixel_values"].shape[2:])
    for row, own in zip(pixels, made["pixel_values"][:, 0].split(list(images)), strict=True):
        row[: len(own)] = own
    return made | {"pixel_values": pixels}
