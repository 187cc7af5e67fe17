"""The demo's report: one HTML file that needs no other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moe_llava.common.files import read_lines, write_whole
from moe_llava.routing.plots import NARROW, Chart, as_data, data_url, plot_expert_load

mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})

CHECKPOINTS = {"stage1": "stage1", "stage2": "stage2", "dense": "dense", "sparse": "stage3"}  # name in the report -> folder
MAJORITY, BLIND = "majority", "blind"  # baselines without a picture
LABELS = {"stage1": "stage I", "stage2": "stage II", "dense": "stage III, dense", "sparse": "stage III, sparse"}
LABELS |= {MAJORITY: "most frequent answer", BLIND: "sparse, without the picture"}
COLOURS = {"stage1": "#BBBBBB", "stage2": "#56B4E9", "dense": "#E69F00", "sparse": "#009E73", MAJORITY: "#BBBBBB", BLIND: "#CC79A7"}
SHEET_PICTURES = 12


def write_report(
    out: Path, results: dict[str, Any], answered: dict[str, list[dict[str, Any]]], routing: dict[str, Any], chat_command: str
) -> Path:
    """Write `out`/report.html and return its path."""
    logs = {name: read_lines(out / folder / "log.jsonl") for name, folder in CHECKPOINTS.items()}
    page = (
        pages()
        .get_template("report.html.jinja")
        .render(
            results=results,
            labels={name: LABELS[name] for name in CHECKPOINTS},
            experts=routing["experts"],
            top_k=routing["top_k"],
            plots={
                "accuracy": chart(plot_accuracy, results["accuracy"]),
                "existence": chart(plot_existence, results),
                "losses": chart(plot_losses, logs),
                "load": chart(plot_expert_load, routing),
            },
            sheet=sheet(answered["sparse"]),
            chat_command=chat_command,
        )
    )
    path = out / "report.html"
    write_whole(path, page)
    return path


def pages(*folders: Path) -> Environment:
    """Return the templates of reports: those here, and those in `folders`."""
    loader = FileSystemLoader([Path(__file__).parent, *folders])
    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=loader)
    environment.filters["percent"] = lambda value: f"{value:.1%}"
    return environment


def chart(plot: Callable[[Any, bool], Figure], data: Any) -> Chart:
    """Return the figure for wide and for narrow screens."""
    return Chart(as_data(plot(data, False)), as_data(plot(data, True)))


def plot_accuracy(accuracy: dict[str, dict[str, dict[str, float]]], narrow: bool) -> Figure:
    """Draw the accuracy, from 0 to 1, of each checkpoint (checkpoint -> family -> mean, low, high), with a name of LABELS."""
    families = list(accuracy["sparse"])
    rows = math.ceil(len(families) / 4) if narrow else 1
    figure = Figure(figsize=(NARROW, 1.7 * rows + 0.6) if narrow else (9, 3.6), layout="constrained")
    for axis, part in zip(figure.subplots(rows, squeeze=False).flat, np.array_split(families, rows), strict=True):
        for name, places, width in _bars(len(part), list(accuracy)):
            scores = [accuracy[name][family] for family in part]
            means = np.array([score["mean"] for score in scores])
            errors = np.array([[score["mean"] - score["low"], score["high"] - score["mean"]] for score in scores]).T.clip(min=0)
            axis.bar(places, means, width, yerr=errors, color=COLOURS[name], error_kw={"linewidth": 0.9, "alpha": 0.7})
        axis.set_xticks(range(len(part)), part)
        axis.set_ylim(0, 1.02)
        axis.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
        axis.grid(axis="y", alpha=0.25)
    _name_bars(figure, list(accuracy), narrow)
    return figure


def plot_existence(results: dict[str, Any], narrow: bool) -> Figure:
    kinds = list(results["existence"]["sparse"])
    figure = Figure(figsize=(NARROW, 3.0) if narrow else (9, 2.8), layout="constrained")
    axis = figure.subplots()
    for name, places, width in _bars(len(kinds), list(results["existence"])):
        bars = axis.bar(places, [results["existence"][name][kind]["f1"] for kind in kinds], width, color=COLOURS[name])
        axis.bar_label(bars, fmt="{:.2f}", fontsize=8, padding=2, rotation=90 if narrow else 0)
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set_ylim(0, 1.3 if narrow else 1.1)  # with room for the numbers
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axis.set_ylabel("F1")
    _name_bars(figure, list(results["existence"]), narrow)
    return figure


def _bars(groups: int, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray, float]]:
    """Yield (name, places of its bars, their width); the bars stand side by side in each group."""
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        yield name, np.arange(groups) + (number - (len(names) - 1) / 2) * width, width * 0.92


def _name_bars(figure: Figure, names: Sequence[str], narrow: bool) -> None:
    handles = [Patch(color=COLOURS[name], label=LABELS[name]) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=2 if narrow else min(len(names), 4), frameon=False)


def plot_losses(logs: dict[str, list[dict[str, Any]]], narrow: bool) -> Figure:
    """Draw the language loss over the steps of each stage, and the balance loss of the sparse model, averaged over its MoE layers."""
    figure = Figure(figsize=(NARROW, 4.4) if narrow else (9, 2.7), layout="constrained")
    axes = figure.subplots(*((2, 2) if narrow else (1, 4))).flat
    for axis, names, title in zip(axes, (["stage1"], ["stage2"], ["dense", "sparse"]), ("stage I", "stage II", "stage III"), strict=False):
        for name in names:
            lines = [line for line in logs[name] if "loss" in line]
            losses = [line.get("language_loss", line["loss"]) for line in lines]
            axis.plot([line["step"] for line in lines], losses, color=COLOURS[name] if name != "stage1" else "#777777", label=name)
        axis.set_title(f"{title}: language loss", fontsize=9.5, loc="left")
    axes[2].legend(frameon=False, fontsize=8.5)
    lines = [line for line in logs["sparse"] if "balance_loss" in line]
    layers = len(lines[0]["expert_shares"]) if lines else 1
    axes[3].plot([line["step"] for line in lines], [line["balance_loss"] / layers for line in lines], color=COLOURS["sparse"])
    axes[3].axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes[3].set_title("balance loss, layer mean", fontsize=9.5, loc="left")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    return figure


def sheet(answered: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the first test pictures, as data URLs, with all their questions."""
    by_image: dict[str, list[dict[str, Any]]] = {}
    for item in answered:
        by_image.setdefault(item["image"], []).append(item)
    return [(data_url(Path(image).read_bytes(), "png"), items) for image, items in list(by_image.items())[:SHEET_PICTURES]]
