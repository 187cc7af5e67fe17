"""The kind of each token, and the position of an image's tokens in their image.

Shapes: B rows of a batch, S sequence, N images of the batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

TEXT, SPECIAL, IMAGE, VIDEO, AUDIO = range(5)  # saved traces hold these numbers
KINDS = ("text", "special", "image", "video", "audio")
MEDIA = (IMAGE, VIDEO, AUDIO)  # their tokens are placeholders, which have no text
# A processor's output -> the kind of its placeholders.
_PACKING = ("vision_feature_select_strategy", "vision_aspect_ratio")  # settings of a model that packs its features
INPUTS = {"pixel_values": IMAGE, "pixel_values_videos": VIDEO, "input_features": AUDIO, "input_values": AUDIO}


class RoutingError(ValueError):
    """The model's routers cannot be read, or the file is no trace; the message names it."""


def placeholder_kinds(config: Any, inputs: Collection[str]) -> dict[int, int]:
    """Return the kind of each placeholder that a model's configuration names: token id -> IMAGE, VIDEO or AUDIO.

    `inputs`: the names of the model's inputs. Raise RoutingError if they hold a medium whose placeholder the configuration does not name:
    its tokens would count as text.
    """
    kinds = {}
    for kind in MEDIA:
        fields = (f"{KINDS[kind]}_token_id", f"{KINDS[kind]}_token_index")
        token = next((getattr(config, field) for field in fields if getattr(config, field, None) is not None), None)
        if token is not None:
            kinds[token] = kind
        given = [name for name in inputs if INPUTS.get(name) == kind]
        if token is None and given:
            raise RoutingError(
                f"found {given[0]} in the inputs, but the model's configuration has no {fields[0]}, by which to find its tokens"
            )
    return kinds


def image_places(is_image_BS: Tensor, inputs: Mapping[str, Any], model: Any) -> Tensor:
    """Return [B, S, 3]: the index of the image in its row, and the row and column of the patch; -1 for other tokens.

    Raise RoutingError if the images' tokens are not known to form a grid.
    """
    places_BS3 = torch.full((*is_image_BS.shape, 3), -1)
    found = int(is_image_BS.sum())
    if not found:
        return places_BS3
    if hasattr(model.base_model, "pack_image_features"):
        places = _packed(inputs, model.base_model)
    else:
        places = [_grid(number, *sizes) for number, sizes in enumerate(_grids(found, inputs, model.config))]
    places_N3 = torch.cat(places)
    if len(places_N3) != found:
        raise RoutingError(f"found {found} image tokens, but {len(places)} images of {len(places_N3)} tokens in all")
    places_BS3[is_image_BS] = places_N3
    for row, has_image in zip(places_BS3, is_image_BS, strict=True):
        if has_image.any():
            row[has_image, 0] -= row[has_image, 0].min()
    return places_BS3


def _grids(found: int, inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int, int]]:
    """Return (tokens without a place, which come first, rows, columns) of each image, or of each of its tiles."""
    sizes = picture_sizes(inputs, config)
    if sizes is not None:
        step = config.vision_config.patch_size * _merged(config)
        return [(0, height // step, width // step) for height, width in sizes]
    if "image_position_ids" in inputs:  # patches are pooled
        pooled = config.vision_config.pooling_kernel_size
        return [(0, rows // pooled, columns // pooled) for rows, columns in patch_grids(inputs)]
    number = len(tiles(inputs["pixel_values"])) if "pixel_values" in inputs else 0
    if not number or found % number:
        raise RoutingError(f"found {found} image tokens, but {number} images in pixel_values")
    tokens = found // number
    if hasattr(config, "projector_patch_to_query_dict"):
        return [(tokens, 0, 0)] * number  # each is a query to all patches
    side = math.isqrt(tokens)
    before = tokens - side**2
    if before > 1:  # a class token may come first
        raise RoutingError(f"an image has {tokens} tokens, which are no square of patches")
    return [(before, side, side)] * number


def patch_grids(inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return (rows, columns) of each image whose patches come with their positions (column, row), -1 for padding."""
    return [(int(positions[:, 1].max()) + 1, int(positions[:, 0].max()) + 1) for positions in inputs["image_position_ids"]]


def _packed(inputs: Mapping[str, Any], model: Any) -> list[Tensor]:
    """Return the places [tokens, 3] of each image of a model that arranges the features of its tiles itself: it cuts padding off, ends rows
    with a newline, and may interpolate. It is given places as features; those of newlines are -1."""
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    settings = {name: getattr(model.config, name) for name in _PACKING if name in inspect.signature(model.pack_image_features).parameters}
    found, before = [], 0
    for own, size in zip(inputs["pixel_values"], inputs["image_sizes"], strict=True):
        number = len(tiles(own[None]))
        # For each tile: whether a feature is its own, and its row and column there. Interpolation mixes tiles: the largest share counts.
        features = torch.zeros(number, side * side, number, 3)
        for tile in range(number):
            features[tile, :, tile] = torch.stack([torch.ones(side * side), rows, columns], dim=1)
        newline = torch.zeros(3 * number)
        (packed,), _ = model.pack_image_features([features.flatten(2)], size[None], image_newline=newline, **settings)
        shares = packed.view(-1, number, 3)
        tile = shares[..., 0].argmax(dim=1)
        mine = shares[torch.arange(len(shares)), tile]
        places = torch.cat([before + tile[:, None], (mine[:, 1:] / mine[:, :1].clamp(min=1e-6)).round()], dim=1).long()
        places[mine[:, 0] == 0, 1:] = -1
        found.append(places)
        before += number
    return found


def picture_sizes(inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int]] | None:
    """Return (height, width) in pixels of each image as a model of dynamic resolution sees it; None for models with images of one size."""
    if "image_grid_thw" in inputs:  # Qwen's and GLM's models
        patch = config.vision_config.patch_size
        return [(int(height) * patch, int(width) * patch) for _, height, width in inputs["image_grid_thw"]]
    if "image_sizes" in inputs and hasattr(config, "spatial_merge_size"):  # Mistral's
        return [(int(height), int(width)) for height, width in inputs["image_sizes"]]
    return None


def tiles(pixel_values: Tensor) -> Tensor:
    """Return [N, channels, height, width] of images, or of their tiles [rows, tiles, channels, height, width] without empty ones."""
    if pixel_values.dim() == 4:
        return pixel_values
    flat = pixel_values.flatten(0, 1)
    return flat[flat.flatten(1).any(dim=1)]


def _merged(config: Any) -> int:
    """Return how many patches in a row and in a column become one token."""
    return getattr(config, "spatial_merge_size", None) or config.vision_config.spatial_merge_size


def _grid(image: int, before: int, height: int, width: int) -> Tensor:
    rows, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    patches = torch.stack([torch.full_like(rows, image), rows, columns], dim=1)
    return torch.cat([torch.tensor([[image, -1, -1]] * before, dtype=patches.dtype).view(before, 3), patches])
