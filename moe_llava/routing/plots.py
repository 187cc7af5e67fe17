"""Pictures of routing, after the paper's figures 3 to 5. `summary`: of RoutingStatistics. `narrow`: for a page on a telephone.

Shapes: T tokens, L MoE layers, E experts.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moe_llava.common.colours import expert_colour, ink
from moe_llava.routing.counts import whole_percents
from moe_llava.routing.tokens import IMAGE
from moe_llava.routing.trace import Trace

MODALITY_COLOURS = {"image": "#D55E00", "text": "#0072B2"}
INSIDE: dict[str, Any] = {"ha": "center", "va": "center", "in_layout": False}  # numbers in fields; thousands would slow the layout
ACROSS, LINES = 24, 4  # tokens in a line of an answer, and lines
NARROW = 4.6  # inches


@dataclass(frozen=True)
class Chart:
    """A picture as data URLs: for a wide page, and for a telephone, on which the labels of the wide one could not be read."""

    wide: str
    narrow: str


def plot_expert_load(summary: dict[str, Any], narrow: bool = False) -> Figure:
    """Draw, for all, image and text tokens, the share of each expert in every MoE layer, with dashed lines where even shares would end.
    Below them come the experts of patches, in the vision tower and the projector."""
    experts, patches = summary["experts"], summary.get("patches", {})
    layers = summary["layers"] + list(patches)
    counts = {"image": np.array(summary["image"] + list(patches.values()), dtype=float)}
    counts["text"] = np.array(summary["text"] + [[0] * experts] * len(patches), dtype=float)
    height = 0.5 * len(layers) + 1.5
    figure = Figure(figsize=(NARROW, 2.6 * height) if narrow else (11, height), layout="constrained")
    axes = figure.subplots(*((3, 1) if narrow else (1, 3)), sharey=True)
    for axis, (name, counts_LE) in zip(axes, {"all": counts["image"] + counts["text"], **counts}.items(), strict=True):
        shares_LE = counts_LE / counts_LE.sum(axis=1, keepdims=True).clip(min=1)
        percents_EL = np.array([whole_percents(shares_E) for shares_E in shares_LE.tolist()]).T
        left = np.zeros(len(layers))
        for expert, (share, percents) in enumerate(zip(shares_LE.T, percents_EL, strict=True)):
            colour = expert_colour(expert)
            bars = axis.barh(range(len(layers)), share, left=left, color=colour, height=0.84)
            labels = [f"{percent}%" if percent >= 10 else "" for percent in percents]
            axis.bar_label(bars, labels, label_type="center", color=ink(colour), fontsize=9)
            left += share
        for border in range(1, experts):
            axis.axvline(border / experts, color="black", linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
        axis.set_title(f"{name} tokens", loc="left")
        axis.set_xlim(0, 1)
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    _name_layers(axes[0], layers)
    _legend(figure, experts)
    return figure


def plot_modality(summary: dict[str, Any], narrow: bool = False) -> Figure:
    """Draw, for every expert of every layer, the share of image tokens among its tokens; white is their share among all tokens."""
    layers, experts, tokens = summary["layers"], summary["experts"], summary["tokens"]
    shares_LE = np.array(summary["image_share"], dtype=float)  # None becomes NaN
    middle = tokens["image"] / (tokens["image"] + tokens["text"])
    norm = TwoSlopeNorm(min(max(middle, 0.01), 0.99), 0, 1)
    width = NARROW if narrow else max(5.0, 0.8 * experts + 2.6)
    figure = Figure(figsize=(width, 0.5 * len(layers) + 1.6), layout="constrained")
    axis = figure.subplots()
    colours = mpl.colormaps["PuOr_r"].with_extremes(bad="#dddddd")
    picture = axis.imshow(shares_LE, cmap=colours, norm=norm, aspect="auto")
    for (layer, expert), share in np.ndenumerate(shares_LE):
        text, background = ("dead", "#dddddd") if np.isnan(share) else (f"{share:.0%}", mpl.colors.to_hex(colours(norm(share))))
        axis.text(expert, layer, text, **INSIDE, color=ink(background), fontsize=9)
    axis.set_xticks(range(experts))
    axis.set_xlabel("expert")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(f"share of image tokens (in all: {middle:.0%})", loc="left")
    _name_layers(axis, layers)
    bar = figure.colorbar(picture, ax=axis, ticks=[0, middle, 1], shrink=0.9)
    bar.ax.set_yticklabels(["only\ntext", "as in\nall", "only\nimages"])
    bar.outline.set_visible(False)
    return figure


def plot_pathways(summary: dict[str, Any], narrow: bool = False) -> Figure:
    """Draw the ten most frequent pathways of image and of text tokens: the wider and darker, the more tokens take it."""
    layers, experts = summary["layers"], summary["experts"]
    height = 0.75 * experts + 2
    figure = Figure(figsize=(NARROW, 2 * height) if narrow else (max(9.0, 0.6 * len(layers) + 5), height), layout="constrained")
    axes = figure.subplots(*((2, 1) if narrow else (1, 2)), sharey=True)
    for axis, name in zip(axes, ("image", "text"), strict=True):
        found = summary["pathways"][name]
        paths = found["paths"]
        for expert in range(0, experts, 2):
            axis.axhspan(expert - 0.5, expert + 0.5, color="#eef1f5", zorder=0)
        for rank, path in reversed(list(enumerate(paths))):
            # Side by side where several pass through the same expert.
            heights = np.array(path["experts"]) + (rank - (len(paths) - 1) / 2) * 0.07
            colour = mpl.colormaps["viridis"](rank / 10)
            width = 1 + 9 * math.sqrt(path["share"])
            axis.plot(range(len(layers)), heights, color=colour, linewidth=width, marker="o", markersize=width + 2)
            axis.plot([], [], color=colour, linewidth=4, label=f"{path['share']:.1%}")
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(handles[::-1], labels[::-1], title="of tokens", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
        kept = "" if found["explained"] is None else f" ({found['tokens']:,} tokens; variance kept {found['explained']:.0%})"
        axis.set_title(f"{name}{kept}", loc="left", fontsize=10)
        axis.set_xticks(range(len(layers)), map(str, layers))
        axis.set_xlim(-0.4, len(layers) - 0.6)
        axis.set_xlabel("layer")
        axis.set_ylim(experts - 0.5, -0.5)
        axis.set_yticks(range(experts), [f"expert {expert}" for expert in range(experts)])
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def plot_router(summary: dict[str, Any], narrow: bool = False) -> Figure:
    """Draw how sure the routers are, how informative the choice of an expert is, and how far the choices of two layers agree."""
    layers, experts = summary["layers"], summary["experts"]
    figure = Figure(figsize=(NARROW, 11) if narrow else (13, 3.4), layout="constrained")
    sure, margin, information, agreement = figure.subplots(*((4, 1) if narrow else (1, 4)))
    places = range(len(layers))
    for name in MODALITY_COLOURS:
        if summary["tokens"][name]:
            sure.plot(places, summary["entropy"][name], **_line(name), label=f"{name} tokens")
            margin.plot(places, summary["margin"][name], **_line(name))
    sure.axhline(math.log2(experts), color="black", linewidth=0.8, linestyle=":")
    sure.set_title("entropy of the router, bits\n(dotted: all experts equal)", loc="left", fontsize=10)
    sure.set_ylim(0, math.log2(experts) * 1.08 + 0.01)
    sure.legend(frameon=False, fontsize=9)
    margin.set_title("margin of the first expert\nover the second", loc="left", fontsize=10)
    margin.set_ylim(bottom=0)
    information.plot(places, summary["modality_information"], color="black", marker="o", label="image or text")
    if summary["group_information"] is not None:
        information.plot(places, summary["group_information"], color="#009E73", marker="s", label="group, of text")
    information.legend(frameon=False, fontsize=9)
    information.set_title("mutual information of expert\nand token, bits", loc="left", fontsize=10)
    information.set_ylim(bottom=0)
    for axis in (sure, margin, information):
        axis.set_xlabel("layer")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    picture = agreement.imshow(summary["agreement"], vmin=0, vmax=1, cmap="cividis")
    step = math.ceil(len(layers) / 8)  # with more layers, the numbers of all would overlap
    for axis in (sure, margin, information, agreement):
        axis.set_xticks(places[::step], map(str, layers[::step]))
    agreement.set_yticks(places[::step], map(str, layers[::step]))
    agreement.set_title("agreement between layers\n(1: one determines the other)", loc="left", fontsize=10)
    figure.colorbar(picture, ax=agreement, shrink=0.8)
    return figure


def _line(modality: str) -> dict[str, Any]:
    """Return a style in which a line of text tokens on top of one of image tokens leaves both visible."""
    style = {"marker": "o", "linewidth": 4, "markersize": 9, "alpha": 0.6} if modality == "image" else {"marker": "s", "markersize": 5}
    return {"color": MODALITY_COLOURS[modality], **style}


def plot_patches(trace: Trace, pictures: Sequence[np.ndarray], experts: int) -> Figure:
    """Draw every image of a trace whose patches have places, and beside it, for each layer, its patches in the colour of their first
    expert. `pictures`: [height, width, 3] in 0..1, as the model sees them."""
    columns = 1 + len(trace.layers)
    across = min(columns, 5)
    down = math.ceil(columns / across)
    figure = Figure(figsize=(2.4 * across, 2.55 * down * len(trace.pictures) + 0.4), layout="constrained")
    axes = figure.subplots(down * len(trace.pictures), across, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, number in enumerate(trace.pictures):
        here, picture = axes[place * down : (place + 1) * down].flat, pictures[number]
        here[0].imshow(picture, interpolation="nearest")
        here[0].set_title("input of the model", fontsize=9)
        for index, layer in enumerate(trace.layers):
            _draw_patches(here[index + 1], picture, first_experts(trace, number, index))
            here[index + 1].set_title(f"layer {layer}", fontsize=9)
    _legend(figure, experts)
    return figure


def first_experts(trace: Trace, image: int, layer: int) -> np.ndarray:
    """Return [rows, columns]: the first expert of each patch of an image. `layer`: counts the trace's layers."""
    patch_T = (trace.kinds_T == IMAGE) & (trace.places_T3[:, 0] == image) & (trace.places_T3[:, 1] >= 0)
    rows, columns = trace.places_T3[patch_T, 1:].T
    chosen = np.zeros((int(rows.max()) + 1, int(columns.max()) + 1), dtype=int)
    chosen[rows, columns] = trace.ids_LTK[layer, patch_T, 0]
    return chosen


def _draw_patches(axis: Axes, picture: np.ndarray, chosen: np.ndarray) -> None:
    height, width = picture.shape[:2]
    grey = 0.4 + 0.6 * picture.mean(axis=2, keepdims=True).repeat(3, axis=2)  # a dark picture would darken the colours
    axis.imshow(grey, interpolation="nearest", extent=(0, width, height, 0))
    colours = np.array([[to_rgb(expert_colour(expert)) for expert in row] for row in chosen])
    axis.imshow(colours, interpolation="nearest", extent=(0, width, height, 0), alpha=0.75)
    if max(chosen.shape) > 12:
        return  # numbers would be too small
    high, wide = height / chosen.shape[0], width / chosen.shape[1]
    for (row, column), expert in np.ndenumerate(chosen):
        centre = (column + 0.5) * wide, (row + 0.5) * high
        axis.text(*centre, str(expert), **INSIDE, fontsize=7.5, color=ink(expert_colour(expert)), weight="bold")


def plot_answer(trace: Trace, experts: int) -> Figure:
    """Draw the first tokens of the answers from left to right, with a row for each layer, in the colour of their first expert."""
    places = trace.answer_T.nonzero().flatten().tolist()
    pieces = trace.pieces or tuple(map(str, trace.token_ids_T.tolist()))
    shown = places[: ACROSS * LINES]
    lines = [shown[start : start + ACROSS] for start in range(0, len(shown), ACROSS)] or [[]]
    across = max(8, *map(len, lines))
    figure = Figure(figsize=(0.5 * across + 1, (0.3 * len(trace.layers) + 0.8) * len(lines) + 0.7), layout="constrained")
    figure.suptitle(f"{len(shown)} of {len(places)} tokens of the answer", fontsize=10, x=0.01, ha="left")
    for axis, line in zip(figure.subplots(len(lines), squeeze=False).flat, lines, strict=True):
        chosen = trace.ids_LTK[:, line, 0].numpy()
        colours = np.array([[to_rgb(expert_colour(expert)) for expert in row] for row in chosen]).reshape(*chosen.shape, 3)
        axis.imshow(colours, aspect="auto", interpolation="nearest")
        axis.vlines(np.arange(len(line)) + 0.5, -0.5, len(chosen) - 0.5, color="white", linewidth=1.5)
        axis.hlines(np.arange(len(chosen)) + 0.5, -0.5, len(line) - 0.5, color="white", linewidth=1.5)
        for (layer, column), expert in np.ndenumerate(chosen):
            axis.text(column, layer, str(expert), **INSIDE, fontsize=8, color=ink(expert_colour(expert)))
        axis.set_xlim(-0.5, across - 0.5)
        axis.set_xticks(range(len(line)), [_plain(pieces[token]) for token in line], rotation=35, ha="left")
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        _name_layers(axis, trace.layers)
    _legend(figure, experts)
    return figure


def _plain(piece: str) -> str:
    """Return a token as a label, with $ escaped, which matplotlib would read as mathematics."""
    shown = piece.strip() or repr(piece).strip("'")
    return shown.replace("$", r"\$")


def _name_layers(axis: Axes, layers: Sequence[int | str]) -> None:
    axis.set_yticks(range(len(layers)), [f"layer {layer}" if isinstance(layer, int) else layer for layer in layers])
    axis.set_ylim(len(layers) - 0.5, -0.5)


def _legend(figure: Figure, experts: int) -> None:
    handles = [Patch(color=expert_colour(expert), label=f"expert {expert}") for expert in range(experts)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(experts, int(figure.get_figwidth() / 1.25)), frameon=False)


def as_data(figure: Figure) -> str:
    """Return a picture as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return data_url(buffer.getvalue(), "svg+xml")


def data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
