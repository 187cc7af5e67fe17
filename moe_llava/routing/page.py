"""One HTML page, which needs no other file, that shows what the routers did, token by token.

It holds numbers as base64 of small integers, little endian, as JavaScript's typed arrays read them.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image
from torch import Tensor

from moe_llava.common.colours import expert_colour, ink
from moe_llava.routing.plots import Chart, data_url
from moe_llava.routing.tokens import KINDS
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


def as_seen(pixels_NCHW: Tensor, processor: Any) -> list[np.ndarray]:
    """Return [height, width, 3] in 0..1 of each image as the model sees it: padded, cut and scaled, without the pixels at the right and at
    the bottom that fill no patch."""
    height, width = (size // processor.patch_size * processor.patch_size for size in pixels_NCHW.shape[2:])
    pixels = pixels_NCHW[:, :, :height, :width].permute(0, 2, 3, 1).float().numpy()
    mean, std = np.array(processor.image_processor.image_mean), np.array(processor.image_processor.image_std)
    return list((pixels * std + mean).clip(0, 1))


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
