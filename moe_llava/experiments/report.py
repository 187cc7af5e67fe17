"""The demo's report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from moe_llava.evaluation.digits import Answered
from moe_llava.routing.plots import plot_expert_load

mpl.use("Agg")
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})

LABELS = {
    "stage1": "stage I: projector",
    "stage2": "stage II: language model",
    "dense": "stage III: dense control",
    "sparse": "stage III: sparse",
}
COLOURS = {"stage1": "#BBBBBB", "stage2": "#56B4E9", "dense": "#E69F00", "sparse": "#009E73"}
SHEET_COLUMNS = 4

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #f6f7f9; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { margin: 2.6rem 0 .6rem; font-size: 1.25rem; }
p { max-width: 46rem; } .quiet { color: #5c6675; font-size: .92rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .9rem; margin: 1.4rem 0; }
.card { background: #fff; border-radius: .6rem; padding: .9rem 1.1rem; box-shadow: 0 1px 3px #0002; }
.card b { display: block; font-size: 1.6rem; } .card span { color: #5c6675; font-size: .88rem; }
figure { background: #fff; border-radius: .6rem; box-shadow: 0 1px 3px #0002; margin: .8rem 0; padding: .8rem; } figure img { width: 100%; display: block; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; background: #fff; font-size: .92rem; width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #e4e8ed; white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .9rem; }
.shot { background: #fff; border-radius: .6rem; overflow: hidden; box-shadow: 0 1px 3px #0002; font-size: .84rem; }
.shot img { width: 100%; image-rendering: pixelated; display: block; } .shot ul { list-style: none; margin: 0; padding: .5rem .7rem; }
.right::before { content: "✓ "; color: #00805c; font-weight: 700; } .wrong::before { content: "✗ "; color: #c33; font-weight: 700; }
.wrong i { color: #c33; } li { margin: .2rem 0; }
"""


def write_report(out: Path, results: dict[str, Any], answered: dict[str, list[Answered]], routing: dict[str, Any]) -> Path:
    """Writes `out`/report.html."""
    logs = {name: read_log(out / ("stage3" if name == "sparse" else name) / "log.jsonl") for name in LABELS}
    sections = [
        headline(results),
        "<h2>Accuracy after every stage</h2><p>Every answer must be right to the letter. The bars show 95% bootstrap intervals over pictures.</p>",
        picture(plot_accuracy(results), "accuracy by question family"),
        accuracy_table(results),
        "<h2>Does it see what is not there?</h2><p>Existence questions, half of them to be denied. The digit asked for is any absent one (random), one in "
        "the colour that it often wears (popular), or a digit and a colour that are both in the picture, but not together (adversarial).</p>",
        picture(plot_existence(results), "existence F1 by kind of negative"),
        "<h2>Training</h2>",
        picture(plot_losses(logs), "loss curves"),
        training_table(results),
        "<h2>Which expert takes what</h2><p>Share of each expert in the tokens of the test questions: left the tokens of the picture, right those of the text.</p>",
        picture(plot_expert_load(routing), "expert load per layer"),
        "<h2>Pictures, questions, answers</h2><p>The first test pictures, as the sparse model answers. None of this handwriting was trained on.</p>",
        sheet(answered["sparse"]),
    ]
    page = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>MoE-LLaVA on handwritten digits</title><style>{STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def headline(results: dict[str, Any]) -> str:
    dense, sparse = (results["accuracy"][name]["all"] for name in ("dense", "sparse"))
    parameters = results["parameters"]
    difference = sparse["mean"] - dense["mean"]
    overlap = sparse["low"] <= dense["high"] and dense["low"] <= sparse["high"]
    verdict = "their 95% intervals overlap" if overlap else "their 95% intervals do not overlap"
    minutes = sum(results["seconds"].values()) / 60
    cards = [
        (f"{results['accuracy']['stage2']['all']['mean']:.1%}", "after stage II"),
        (f"{sparse['mean']:.1%}", f"sparse, {sparse['low']:.1%} to {sparse['high']:.1%}"),
        (f"{dense['mean']:.1%}", f"dense control, {dense['low']:.1%} to {dense['high']:.1%}"),
        (
            f"{parameters['active'] / 1e6:.2f}M of {parameters['total'] / 1e6:.2f}M",
            f"active parameters; dense {parameters['dense'] / 1e6:.2f}M",
        ),
        (f"{minutes:.1f} min", f"training, all four runs, {results['threads']} threads"),
    ]
    body = "".join(f"<div class='card'><b>{value}</b><span>{html.escape(label)}</span></div>" for value, label in cards)
    return (
        "<h1>MoE-LLaVA on handwritten digits</h1>"
        f"<p>A small vision-language model learns in three stages to answer questions about scenes of real handwriting. In stage III its feed-forward networks "
        f"become experts; a dense control has the same networks trained for the same steps on the same data. On {results['test_images']} pictures of handwriting never "
        f"trained on, sparse is {abs(difference) * 100:.1f} points {'above' if difference >= 0 else 'below'} dense; {verdict}.</p><div class='cards'>{body}</div>"
    )


def plot_accuracy(results: dict[str, Any]) -> Figure:
    families = list(results["accuracy"]["sparse"])
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
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
    figure, axis = plt.subplots(figsize=(9, 2.8), layout="constrained")
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
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.7), layout="constrained")
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
    axes[3].set_title("balance loss per layer (1: even)", fontsize=9.5, loc="left")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    return figure


def accuracy_table(results: dict[str, Any]) -> str:
    rows = []
    for family in results["accuracy"]["sparse"]:
        scores = [results["accuracy"][name][family] for name in LABELS]
        cells = [f"{score['mean']:.1%} <span class='quiet'>[{score['low']:.1%}, {score['high']:.1%}]</span>" for score in scores]
        rows.append([family, str(scores[0]["n"]), *cells])
    return table(["family", "questions", *LABELS.values()], rows)


def training_table(results: dict[str, Any]) -> str:
    parameters = results["parameters"]
    rows = [["training time", *(f"{results['seconds'][name]:.0f} s" for name in LABELS)]]
    rows.append(["parameters", *[f"{parameters['dense']:,}"] * 3, f"{parameters['total']:,}"])
    rows.append(["active per token", *[f"{parameters['dense']:,}"] * 3, f"{parameters['active']:,}"])
    return table(["", *LABELS.values()], rows)


def sheet(answered: list[Answered], pictures: int = 12) -> str:
    """The first pictures with all their questions."""
    by_image: dict[str, list[Answered]] = {}
    for item in answered:
        by_image.setdefault(item.image, []).append(item)
    shots = []
    for image, items in list(by_image.items())[:pictures]:
        lines = []
        for item in items:
            given = f"{item.question} <b>{html.escape(item.given)}</b>"
            lines.append(
                f"<li class='right'>{given}</li>" if item.right else f"<li class='wrong'>{given} <i>({html.escape(item.expected)})</i></li>"
            )
        data = base64.b64encode(Path(image).read_bytes()).decode()
        shots.append(f"<div class='shot'><img alt='test picture' src='data:image/png;base64,{data}'><ul>{''.join(lines)}</ul></div>")
    return f"<div class='sheet'>{''.join(shots)}</div>"


def table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{top}</tr>{body}</table></div>"


def picture(figure: Figure, alt: str) -> str:
    """A figure as inline SVG data."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<figure><img alt='{html.escape(alt)}' src='data:image/svg+xml;base64,{data}'></figure>"


def read_log(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
