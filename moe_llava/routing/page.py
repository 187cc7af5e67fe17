"""One HTML page, which needs no other file, that shows what the routers did, token by token.

It holds numbers as base64 of small integers, little endian, as JavaScript's typed arrays read them.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image
from torch import Tensor

from moe_llava.common.colours import expert_colour, ink
from moe_llava.routing.plots import Chart, data_url
from moe_llava.routing.tokens import KINDS, patch_grids, picture_sizes, tiles
from moe_llava.routing.trace import Trace

ONE = 65535  # stands for a probability of 1


@dataclass(frozen=True)
class Example:
    """A conversation on the page. `pictures`: [height, width, 3] in 0..1, as the model sees them."""

    source: str
    title: str
    group: str
    pictures: list[np.ndarray]
    trace: Trace


def write_page(
    file: Path,
    name: str,
    records: int,
    group_by: str | None,
    summary: dict[str, Any],
    examples: Sequence[Example],
    charts: dict[str, Chart],
) -> None:
    """Write the page. `name`: of the checkpoint. `records`: how many the summary covers."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string((Path(__file__).parent / "page.html.jinja").read_text(encoding="utf-8"))
    colours = [expert_colour(expert) for expert in range(summary["experts"])]
    data = {
        "experts": summary["experts"],
        "topK": summary["top_k"],
        "layers": summary["layers"],
        "colours": colours,
        "inks": [ink(colour) for colour in colours],
        "kinds": KINDS,
        "one": ONE,
        "examples": [_example(example) for example in examples],
    }
    # A record may hold "</script>".
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = template.render(
        name=name,
        records=records,
        group_by=group_by,
        summary=summary,
        charts=charts,
        data=text,
    )
    file.write_text(page, encoding="utf-8")


def as_seen(inputs: Mapping[str, Tensor], processor: Any, config: Any) -> list[np.ndarray]:
    """Return [height, width, 3] in 0..1 of each image, or of each of its tiles, as the model sees it: padded, cut and scaled, without the
    pixels at the right and at the bottom that fill no patch. `inputs`: those of the model, possibly without images."""
    if "pixel_values" not in inputs:
        return []
    images, sizes = processor.image_processor, picture_sizes(inputs, config)
    if "image_grid_thw" in inputs:
        seen = _from_patches(inputs["pixel_values"], inputs["image_grid_thw"].tolist(), images)
    elif "image_position_ids" in inputs:
        seen = _from_positions(inputs["pixel_values"], patch_grids(inputs))
    else:
        seen = list(tiles(inputs["pixel_values"]))
    if sizes is None:
        patch = getattr(processor, "patch_size", None) or 1
        sizes = [(picture.shape[1] // patch * patch, picture.shape[2] // patch * patch) for picture in seen]
    shift, scale = (np.array(getattr(images, name, None) or other) for name, other in (("image_mean", [0.0] * 3), ("image_std", [1.0] * 3)))
    pictures = [picture[:, :height, :width].permute(1, 2, 0).float().numpy() for picture, (height, width) in zip(seen, sizes, strict=True)]
    return [(picture * scale + shift).clip(0, 1) for picture in pictures]


def _from_patches(patches: Tensor, grids: list[list[int]], images: Any) -> list[Tensor]:
    """Return [channels, height, width] of each image from its patches [patches, channels x time x size x size], which stand in groups that
    become one token."""
    merge, size, time = images.merge_size, images.patch_size, images.temporal_patch_size
    found = []
    for (frames, rows, columns), own in zip(grids, patches.split([math.prod(grid) for grid in grids]), strict=True):
        own = own.view(frames, rows // merge, columns // merge, merge, merge, -1, time, size, size)
        found.append(own[0, ..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, rows * size, columns * size))
    return found


def _from_positions(patches: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
    """Return [channels, height, width] of each image from its patches [N, patches, size x size x channels], which stand in rows."""
    found = []
    for own, (rows, columns) in zip(patches, grids, strict=True):
        size = math.isqrt(own.shape[1] // 3)
        cut = own[: rows * columns].view(rows, columns, size, size, 3)
        found.append(cut.permute(4, 0, 2, 1, 3).reshape(3, rows * size, columns * size))
    return found


def png_url(picture: np.ndarray) -> str:
    """Return the data URL of a picture [height, width, 3] in 0..1."""
    buffer = io.BytesIO()
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(buffer, "png")
    return data_url(buffer.getvalue(), "png")


def _example(example: Example) -> dict[str, Any]:
    trace = example.trace
    return {
        "source": example.source,
        "title": example.title.replace("<image>", "").strip(),
        "group": example.group,
        "pictures": [png_url(picture) for picture in example.pictures],
        "pieces": trace.pieces,
        "kinds": trace.kinds_T.tolist(),
        "answer": trace.answer_T.int().tolist(),
        "places": _packed(trace.places_T3, "<i2"),
        "probs": _packed(trace.probs_LTE * ONE, "<u2"),
        "ids": _packed(trace.ids_LTK, "<u2"),
        "weights": _packed(trace.weights_LTK * ONE, "<u2"),
        "dropped": _packed(trace.dropped_LTK, "<u2"),
    }


def _packed(values: Tensor, kind: str) -> str:
    return base64.b64encode(values.float().round().numpy().astype(kind).tobytes()).decode()
