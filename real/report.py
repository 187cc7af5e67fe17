"""The report of the whole pipeline: one HTML file that needs no other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_llava.common.files import read_lines, write_whole
from moe_llava.data.records import IMAGE_TOKEN
from moe_llava.evaluation.score.questions import Question
from moe_llava.experiments.report import BLIND, CHECKPOINTS, LABELS, MAJORITY, chart, pages, plot_accuracy, plot_losses
from moe_llava.routing.plots import data_url, plot_expert_load

SHEET_PICTURES = 12
FAMILY_TITLES = {
    "all": "all questions",
    "name": "what is this?",
    "category": "what kind of thing?",
    "kind": "is this a kind of ...?",
    "colour": "what colour?",
    "random": "is this a ...? (any other)",
    "popular": "is this a ...? (frequent)",
    "adversarial": "is this a ...? (alike)",
}
ORDER = (MAJORITY, BLIND, "stage2", "dense", "sparse")


def write_report(
    out: Path, results: dict[str, Any], routing: dict[str, Any], questions: Sequence[Question], items: Sequence[dict[str, Any]]
) -> Path:
    """Write `out`/report.html and return its path. `items`: the sparse model's answers to the questions, scored."""
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
            sheet=_sheet(questions, items),
            patches=[data_url(file.read_bytes(), "png") for file in sorted((out / "routes" / "examples").glob("*-patches.png"))[:6]],
        )
    )
    path = out / "report.html"
    write_whole(path, page)
    return path


def _drawn(scores: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return shares of 1, in the order of the figure."""
    return {name: {family: {key: value / 100 for key, value in score.items()} for family, score in scores[name].items()} for name in ORDER}


def _sheet(questions: Sequence[Question], items: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return tested pictures, as data URLs, evenly spread, with each question once and the answer that `items` have."""
    by_image: dict[Any, dict[str, dict[str, Any]]] = {}
    for question, item in zip(questions, items, strict=True):
        shown = {"question": _shortened(question.prompt), "given": item["given"], "expected": question.extra["answer"]}
        by_image.setdefault(question.images[0], {})[question.prompt] = shown | {"right": item["right"] == 1}
    chosen = list(by_image)[:: max(len(by_image) // SHEET_PICTURES, 1)][:SHEET_PICTURES]
    return [(data_url(image.read_bytes(), "png"), list(by_image[image].values())) for image in chosen]


def _shortened(question: str) -> str:
    """Leave out the placeholder, and what the answer has to look like."""
    return question.removeprefix(f"{IMAGE_TOKEN}\n").split(":")[0].split("?")[0] + "?"
