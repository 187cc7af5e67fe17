"""Pictures of experiments. Cells have Okabe and Ito's colours, in order; every mark is also named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_llava.common.colours import EXPERT_COLOURS
from moe_llava.evaluation.score.statistics import Interval
from moe_llava.experiments.summary import Kept, Row

mpl.use("Agg")

COLOURS = tuple(colour for colour in EXPERT_COLOURS if colour != "#F0E442")  # yellow lines are hard to see on white
GREY = "#777777"
WHITE = {"color": "white", "pad": 0.5}
MARKERS = "osD^v<>P"


def plot_comparison(
    rows: Sequence[Row], score: str, baseline: str, margin: float | None = None, interval: str = "95% interval over seeds"
) -> Figure:
    """Draw every seed and the mean of each cell on the left, the differences on the right, with 95% intervals. `interval`: the name of
    those on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 1.6 + 0.5 * len(rows)), sharey=True, layout="constrained")
    for place, row in enumerate(rows):
        colour = COLOURS[place % len(COLOURS)]
        left.scatter(row.values, np.full(len(row.values), place + 0.18), s=14, color=colour, alpha=0.6, linewidths=0)
        _interval(left, row.mean, place - 0.08, colour)
        if row.difference is not None:
            _interval(right, row.difference, place, colour)
            if row.against != baseline:
                where = (row.difference.mean, place - 0.18)
                right.annotate(f"from {row.against}", where, fontsize=8, color=GREY, ha="center", va="bottom", bbox=WHITE)
    right.axvline(0, color="black", linewidth=0.8)
    if margin is not None:
        right.axvline(-margin, color="black", linewidth=1, linestyle="--")
        right.annotate(f"margin {margin:g}", (-margin, 1.0), xycoords=("data", "axes fraction"), fontsize=8.5, ha="center", va="bottom")
    left.set_yticks(range(len(rows)), [row.cell for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel(f"{score}: seeds, mean, 95% interval over seeds", fontsize=9.5)
    right.set_xlabel(f"difference from {baseline},\n{interval}", fontsize=9.5)
    for axis in (left, right):
        axis.locator_params(axis="x", nbins=5)  # more numbers would touch each other
        _tidy(axis, "x")
    return figure


def _tidy(axis: Axes, grid: Literal["x", "y"]) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, alpha=0.25)


def _interval(axis: Axes, interval: Interval, place: float, colour: str) -> None:
    axis.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2)
    axis.plot([interval.mean], [place], "D", color=colour, markersize=6)


def plot_differences(differences: Mapping[str, Interval], title: str) -> Figure:
    """Draw the difference between two cells, score by score."""
    figure, axis = plt.subplots(figsize=(7.5, 1.3 + 0.32 * len(differences)), layout="constrained")
    for place, interval in enumerate(differences.values()):
        _interval(axis, interval, place, COLOURS[0])
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(differences)), list(differences))
    axis.invert_yaxis()
    axis.set_xlabel("difference over seeds, 95% interval", fontsize=9.5)
    axis.set_title(title, loc="left", fontsize=10.5)
    _tidy(axis, "x")
    return figure


def plot_interactions(rows: Sequence[Kept], scales: tuple[str, str]) -> Figure:
    """Draw what variants keep under each perturbation, at both scales, and the difference; a colour for each variant."""
    names, variants = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("perturbation", "variant"))
    figure, axes = plt.subplots(1, 3, figsize=(11, 1.4 + 0.55 * len(names)), sharey=True, sharex=True, layout="constrained")
    for row in rows:
        which = variants.index(row.variant)
        place = names.index(row.perturbation) + (which - (len(variants) - 1) / 2) * 0.7 / len(variants)
        for axis, interval in zip(axes, (*row.scales, row.interaction), strict=True):
            _interval(axis, interval, place, COLOURS[which])
    for axis, title in zip(axes, (*(f"kept, {scale}" for scale in scales), f"{scales[1]} minus {scales[0]}"), strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(title, loc="left", fontsize=10.5)
        axis.locator_params(axis="x", nbins=5)
        _tidy(axis, "x")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].set_xlabel("share of the questions, adjusted 95% interval over seeds", fontsize=9.5)
    handles = [Line2D([], [], color=COLOURS[place], marker="D", linewidth=2, label=name) for place, name in enumerate(variants)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(variants), frameon=False, fontsize=9)
    return figure


def plot_calibration(results: Sequence[dict[str, Any]], cells: Sequence[str]) -> Figure:
    """Draw the share of questions whose answer is yes against the predicted probability of yes, in bins, all seeds together."""
    figure, axis = plt.subplots(figsize=(4.8, 4.6), layout="constrained")
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    for place, cell in enumerate(cells):
        bins = [each for result in results if result["cell"] == cell for each in result["calibration"]["bins"]]
        numbers, p, affirmed = (np.array([each[key] for each in bins]) for key in ("n", "probability", "affirm"))
        index = np.minimum((p * 10).astype(int), 9)
        kept = np.unique(index)
        totals = np.bincount(index, numbers)[kept]
        x, y = (np.bincount(index, numbers * values)[kept] / totals for values in (p, affirmed))
        errors = [result["calibration"]["error"] for result in results if result["cell"] == cell]
        label = f"{cell}: calibration error {np.mean(errors):.3f}"
        axis.plot(x, y, marker=MARKERS[place], color=COLOURS[place], label=label, linewidth=1.5, markersize=6)
    axis.set_xlabel("probability of yes")
    axis.set_ylabel("share of questions whose answer is yes")
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(-0.02, 1.02)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def plot_perturbed(rows: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw each cell's accuracy under each perturbation: mean over seeds with 95% interval."""
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    cells = [row.cell for row in next(iter(rows.values()))]
    for place, cell in enumerate(cells):
        means = [next(row.mean for row in found if row.cell == cell) for found in rows.values()]
        x = np.arange(len(rows)) + (place - (len(cells) - 1) / 2) * 0.8 / len(cells)
        middle, low, high = (np.array([getattr(mean, key) for mean in means]) for key in ("mean", "low", "high"))
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        axis.errorbar(x, middle, [middle - low, high - middle], label=cell, color=colour, fmt=marker, markersize=6, elinewidth=1.5)
    axis.set_xticks(range(len(rows)), list(rows))
    for border in np.arange(len(rows) - 1) + 0.5:
        axis.axvline(border, color="black", alpha=0.15, linewidth=0.8)
    axis.set_ylabel("accuracy")
    _tidy(axis, "y")
    figure.legend(loc="outside lower center", ncols=min(len(cells), 4), frameon=False, fontsize=9)
    return figure


def plot_headline(rows: Sequence[Row], sizes: Mapping[str, Mapping[str, int]], dense: tuple[str, str], title: str) -> Figure:
    """Draw each cell's accuracy against the active and the total parameters of its language model (`sizes`): seeds, mean, 95% interval. A
    line joins the two `dense` cells."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), sharey=True, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    means = {row.cell: row.mean.mean for row in rows}
    aside = 0.015 * max(size["total"] for size in sizes.values()) / 1e6  # seeds are drawn beside their mean
    for axis, key in zip(axes, ("active", "total"), strict=True):
        axis.plot([sizes[name][key] / 1e6 for name in dense], [means[name] for name in dense], color=GREY, linewidth=1, linestyle="--")
        for place, row in enumerate(rows):
            x, colour = sizes[row.cell][key] / 1e6, COLOURS[place]
            axis.scatter(np.full(len(row.values), x + aside), row.values, s=14, color=colour, alpha=0.6, linewidths=0)
            error = [[row.mean.mean - row.mean.low], [row.mean.high - row.mean.mean]]
            axis.errorbar([x], [row.mean.mean], error, color=colour, fmt=MARKERS[place], markersize=7, elinewidth=2, label=row.cell)
        axis.set_xlabel(f"{key} parameters of the language model, millions")
        _tidy(axis, "y")
    axes[0].set_ylabel("accuracy: seeds, mean, 95% interval")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def plot_learned(found: Mapping[int, Sequence[Sequence[dict[str, Any]]]], labels: Sequence[str]) -> Figure:
    """Draw what the first expert explains of each label, less chance, by step: each seed as a thin line, their mean as a thick one, a
    colour for each layer."""
    figure, axes = plt.subplots(1, len(labels), figsize=(2.6 * len(labels), 2.9), layout="constrained")
    steps = sorted(found)
    layers = list(dict.fromkeys(one["layer"] for one in found[steps[0]][0]))
    for axis, label in zip(axes, labels, strict=True):
        for place, layer in enumerate(layers):
            values = [
                [one["found"] - one["chance"] for seed in found[step] for one in seed if (one["label"], one["layer"]) == (label, layer)]
                for step in steps
            ]
            for seed in range(min(map(len, values))):
                axis.plot(steps, [by_seed[seed] for by_seed in values], color=COLOURS[place], linewidth=0.8, alpha=0.5)
            mean = [np.mean(by_seed) for by_seed in values]
            axis.plot(steps, mean, color=COLOURS[place], linewidth=2.2, marker=MARKERS[place], markersize=5, label=f"layer {layer}")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(label, loc="left", fontsize=10.5)
        axis.set_xlabel("step of stage III", fontsize=9.5)
        axis.locator_params(axis="x", nbins=4)
        _tidy(axis, "y")
    axes[0].set_ylabel("share of the label's entropy\nthat the expert explains", fontsize=9.5)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    return figure
