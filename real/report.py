"""The report of the whole pipeline: one HTML file that needs no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_llava.common.files import read_lines, write_whole
from moe_llava.experiments.report import BLIND, CHECKPOINTS, LABELS, MAJORITY, chart, pages, plot_accuracy, plot_losses
from moe_llava.routing.plots import data_url, plot_expert_load

SHEET_PICTURES = 12
FAMILY_TITLES = {
    "all": "all questions",
    "name": "what is this?",
    "category": "what kind of thing?",
    "colour": "what colour?",
    "random": "is this a ...? (any other)",
    "popular": "is this a ...? (frequent)",
    "adversarial": "is this a ...? (alike)",
}
ORDER = (MAJORITY, BLIND, "stage2", "dense", "sparse")


def write_report(out: Path, results: dict[str, Any]) -> Path:
    """Write `out`/report.html and return its path."""
    routing = json.loads((out / "routes" / "statistics.json").read_text(encoding="utf-8"))
    logs = {name: read_lines(out / folder / "log.jsonl") for name, folder in CHECKPOINTS.items()}
    page = (
        pages(Path(__file__).parent)
        .get_template("real.html.jinja")
        .render(
            results=results,
            labels={name: LABELS[name] for name in ORDER},
            titles=FAMILY_TITLES,
            routing=routing,
            plots={
                "accuracy": chart(plot_accuracy, _drawn(results["scores"])),
                "losses": chart(plot_losses, logs),
                "load": chart(plot_expert_load, routing),
            },
            sheet=_sheet(out),
            patches=[data_url(file.read_bytes(), "png") for file in sorted((out / "routes" / "examples").glob("*-patches.png"))[:6]],
        )
    )
    path = out / "report.html"
    write_whole(path, page)
    return path


def _drawn(scores: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return shares of 1, in the order of the figure. The most frequent answer has no interval."""
    return {
        name: {
            family: {key: score.get(key, score["mean"]) / 100 for key in ("mean", "low", "high")} for family, score in scores[name].items()
        }
        for name in ORDER
    }


def _sheet(out: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return tested pictures, as data URLs, evenly spread, with each question once and the sparse model's answer."""
    answers = {str(line["question_id"]): line["text"] for line in read_lines(out / "answers" / "sparse" / "questions" / "answers.jsonl")}
    by_image: dict[str, dict[str, dict[str, Any]]] = {}
    for record in json.loads((out / "data" / "test.json").read_text(encoding="utf-8")):
        question, expected = (turn["value"].removeprefix("<image>\n") for turn in record["conversations"])
        given = answers[record["id"]].strip()
        right = expected.lower() in given.lower() if record["family"] == "name" else given.lower().rstrip(".") == expected.lower()
        item = {"question": _shortened(question), "given": given, "expected": expected, "right": right}
        by_image.setdefault(record["image"], {})[question] = item
    chosen = list(by_image)[:: max(len(by_image) // SHEET_PICTURES, 1)][:SHEET_PICTURES]
    return [(data_url((out / "data" / "images" / image).read_bytes(), "png"), list(by_image[image].values())) for image in chosen]


def _shortened(question: str) -> str:
    """Leave out what the answer has to look like."""
    return question.split(":")[0].split("?")[0] + "?"
