"""What kind of token it is, and where in its image.

Shapes: B rows of a batch, S sequence, N images of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TEXT, SPECIAL, IMAGE = range(3)
KINDS = ("text", "special", "image")


class RoutingError(ValueError):
    """A model whose routers cannot be read, or a file that is no trace; the message names it."""


def image_places(is_image_BS: Tensor, inputs: Mapping[str, Any], config: Any) -> Tensor:
    """[B, S, 3]: the image in its row, and the row and column of its patch; -1 elsewhere.

    Raises RoutingError if the images' tokens are not known to lie in a grid.
    """
    places_BS3 = torch.full((*is_image_BS.shape, 3), -1)
    found = int(is_image_BS.sum())
    if not found:
        return places_BS3
    grids = _grids(found, inputs, config)
    places_N3 = torch.cat([_grid(number, *sizes) for number, sizes in enumerate(grids)])
    if len(places_N3) != found:
        raise RoutingError(f"found {found} image tokens, but {len(grids)} images of {len(places_N3)} tokens in all")
    places_BS3[is_image_BS] = places_N3
    for row, has_image in zip(places_BS3, is_image_BS, strict=True):
        if has_image.any():
            row[has_image, 0] -= row[has_image, 0].min()
    return places_BS3


def _grids(found: int, inputs: Mapping[str, Any], config: Any) -> list[tuple[int, int, int]]:
    """(tokens before the patches, rows, columns) of each image."""
    if "image_grid_thw" in inputs:  # Qwen's models: images of any size, whose neighbouring patches are merged
        merge = config.vision_config.spatial_merge_size
        return [(0, int(height) // merge, int(width) // merge) for _, height, width in inputs["image_grid_thw"]]
    number = len(inputs["pixel_values"]) if "pixel_values" in inputs else 0
    if not number or found % number:
        raise RoutingError(f"found {found} image tokens, but {number} images in pixel_values")
    tokens = found // number
    side = math.isqrt(tokens)
    before = tokens - side**2
    if before > 1:  # a class token may come first
        raise RoutingError(f"an image has {tokens} tokens, which are no square of patches")
    return [(before, side, side)] * number


def _grid(image: int, before: int, height: int, width: int) -> Tensor:
    rows, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    patches = torch.stack([torch.full_like(rows, image), rows, columns], dim=1)
    return torch.cat([torch.tensor([[image, -1, -1]] * before, dtype=patches.dtype).view(before, 3), patches])
