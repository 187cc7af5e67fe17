"""The demo's report: one HTML file that needs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from moe_llava.routing.plots import as_data, data_url, plot_expert_load
from moe_llava.training.saves import write_whole

mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})

CHECKPOINTS = {"stage1": "stage1", "stage2": "stage2", "dense": "dense", "sparse": "stage3"}  # name in the report -> folder
LABELS = {
    "stage1": "stage I: projector",
    "stage2": "stage II: language model",
    "dense": "stage III: dense control",
    "sparse": "stage III: sparse",
}
COLOURS = {"stage1": "#BBBBBB", "stage2": "#56B4E9", "dense": "#E69F00", "sparse": "#009E73"}
SHEET_PICTURES = 12


def write_report(
    out: Path, results: dict[str, Any], answered: dict[str, list[dict[str, Any]]], routing: dict[str, Any], chat_command: str
) -> Path:
    """Writes `out`/report.html."""
    logs = {name: read_log(out / folder) for name, folder in CHECKPOINTS.items()}
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["percent"] = lambda value: f"{value:.1%}"
    template = environment.from_string((Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8"))
    page = template.render(
        results=results,
        labels=LABELS,
        experts=routing["experts"],
        top_k=routing["top_k"],
        plots={
            "accuracy": as_data(plot_accuracy(results)),
            "existence": as_data(plot_existence(results)),
            "losses": as_data(plot_losses(logs)),
            "load": as_data(plot_expert_load(routing)),
        },
        sheet=sheet(answered["sparse"]),
        chat_command=chat_command,
    )
    path = out / "report.html"
    write_whole(path, page)
    return path


def plot_accuracy(results: dict[str, Any]) -> Figure:
    families = list(results["accuracy"]["sparse"])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(LABELS)
    for number, (name, label) in enumerate(LABELS.items()):
        scores = [results["accuracy"][name][family] for family in families]
        means = np.array([score["mean"] for score in scores])
        errors = np.array([[score["mean"] - score["low"], score["high"] - score["mean"]] for score in scores]).T.clip(min=0)
        places = np.arange(len(families)) + (number - (len(LABELS) - 1) / 2) * width
        axis.bar(places, means, width * 0.92, yerr=errors, color=COLOURS[name], label=label, error_kw={"linewidth": 0.9, "alpha": 0.7})
    axis.set_xticks(range(len(families)), families)
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    axis.grid(axis="y", alpha=0.25)
    figure.legend(loc="outside upper center", ncols=len(LABELS), frameon=False)
    return figure


def plot_existence(results: dict[str, Any]) -> Figure:
    kinds = list(results["existence"]["sparse"])
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(LABELS)
    for number, (name, label) in enumerate(LABELS.items()):
        places = np.arange(len(kinds)) + (number - (len(LABELS) - 1) / 2) * width
        bars = axis.bar(places, [results["existence"][name][kind]["f1"] for kind in kinds], width * 0.92, color=COLOURS[name], label=label)
        axis.bar_label(bars, fmt="{:.2f}", fontsize=8)
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set_ylim(0, 1.1)
    axis.set_ylabel("F1")
    figure.legend(loc="outside upper center", ncols=len(LABELS), frameon=False)
    return figure


def plot_losses(logs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Language loss over the steps of each stage; the balance loss of the sparse one beside it."""
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    axes = figure.subplots(1, 4)
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
    axes[3].set_title("balance loss (1: even)", fontsize=9.5, loc="left")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    return figure


def sheet(answered: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The first test pictures, as data, with all their questions."""
    by_image: dict[str, list[dict[str, Any]]] = {}
    for item in answered:
        by_image.setdefault(item["image"], []).append(item)
    return [(data_url(Path(image).read_bytes(), "png"), items) for image, items in list(by_image.items())[:SHEET_PICTURES]]


def read_log(stage: Path) -> list[dict[str, Any]]:
    """The lines that a stage logged."""
    return [json.loads(line) for line in (stage / "log.jsonl").read_text(encoding="utf-8").splitlines()]
