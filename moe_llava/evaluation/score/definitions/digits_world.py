"""The benchmark of the digits world: questions about unseen handwriting, with exact answers, per family. Existence is scored as in POPE (Li
et al., arXiv 2305.10355), for each kind of negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moe_llava.data.records import Record
from moe_llava.evaluation.score.benchmark import Benchmark, Columns, Scored, share
from moe_llava.evaluation.score.means import yes_or_no
from moe_llava.evaluation.score.questions import Answers, Question, conversation_questions, image_name
from moe_llava.evaluation.score.reading import take
from moe_llava.evaluation.score.statistics import bootstrap_mean

QUESTIONS = "test.json"
POSITIVE = "positive"
Items = Sequence[dict[str, Any]]


def questions(folder: Path) -> list[Question]:
    return conversation_questions(folder / QUESTIONS, folder / "images", _extra)


def _extra(record: Record, question: Question) -> dict[str, Any]:
    image_name(question, record.source)
    return {key: take(record.extra, key, record.source) for key in ("family", "kind")}


def judge(question: Question, text: str | None) -> dict[str, Any]:
    """Return the item of a question and its answer."""
    expected = question.extra["answer"]
    return {
        "id": question.id,
        "family": question.extra["family"],
        "kind": question.extra["kind"],
        "image": str(question.images[0]),
        "question": question.prompt.removeprefix("<image>").strip(),
        "given": text,
        "expected": expected,
        "right": text == expected,
    }


def score(folder: Path, questions: list[Question], answers: Answers) -> Scored:
    items = [judge(question, text) for question, text in zip(questions, answers, strict=True)]
    return Scored(items, _columns(items), [item["image"] for item in items], _measure)


def _columns(items: Items) -> dict[str, np.ndarray]:
    """`about <kind>` marks the questions that test a kind of negative: its negatives, and as many positives, about the same images."""
    truth = np.array([item["expected"] == "yes" for item in items])
    # All but "yes" counts as no, and a missing answer as the wrong one.
    predicted = [item["given"] == "yes" if item["given"] is not None else item["expected"] != "yes" for item in items]
    columns = {
        "family": np.array([item["family"] for item in items]),
        "right": np.array([item["right"] for item in items]),
        "truth": truth,
        "predicted": np.array(predicted),
    }
    existence = [item for item in items if item["family"] == "existence"]
    for kind in sorted({item["kind"] for item in existence} - {POSITIVE}):
        images = {item["image"] for item in existence if item["kind"] == kind}
        about = [item["kind"] == kind or (item["kind"] == POSITIVE and item["image"] in images) for item in items]
        columns[f"about {kind}"] = np.array(about) & (columns["family"] == "existence")
    return columns


def _measure(columns: Columns, weights: np.ndarray) -> dict[str, float]:
    """Return fractions."""
    right = weights * columns["right"]
    scores = {"accuracy": share(right.sum(), weights.sum())}
    for family in dict.fromkeys(columns["family"].tolist()):
        here = columns["family"] == family
        scores[f"{family}/accuracy"] = share(right[here].sum(), weights[here].sum())
    for kind, found in _by_kind(columns, weights).items():
        scores |= {f"existence/{kind}/{name}": value for name, value in found.items()}
    return scores


def _by_kind(columns: Columns, weights: np.ndarray) -> dict[str, dict[str, float]]:
    kinds = {}
    for name in columns:
        if name.startswith("about "):
            found = yes_or_no(weights * columns[name], columns["predicted"], columns["truth"])
            kinds[name.removeprefix("about ")] = found | {"yes_share": found.pop("yes")}
    return kinds


def accuracy(items: Items) -> dict[str, dict[str, float]]:
    """Return mean, low, high (95%) and n for each family, and for "all"."""
    families = {"all": list(items)}
    for item in items:
        families.setdefault(item["family"], []).append(item)
    return {
        family: asdict(bootstrap_mean([float(item["right"]) for item in members], [item["image"] for item in members]))
        for family, members in families.items()
    }


def existence(items: Items) -> dict[str, dict[str, float]]:
    """Return accuracy, precision, recall, F1, share of yes and n for each kind of negative."""
    columns = _columns(items)
    kinds = _by_kind(columns, np.ones(len(items)))
    return {kind: found | {"n": int(columns[f"about {kind}"].sum())} for kind, found in kinds.items()}


def compare(items: Items, baseline: Items) -> dict[str, float]:
    """Return the difference in accuracy between two checkpoints that answered the same questions: mean, low, high (95%), n. Pairing the
    answers removes the variance that both share."""
    differences = [float(a["right"]) - float(b["right"]) for a, b in zip(items, baseline, strict=True)]
    return asdict(bootstrap_mean(differences, [item["image"] for item in items]))


BENCHMARK = Benchmark(
    name="digits",
    title="The digits world",
    folder="digits/data",  # as `moe-llava digits` writes it
    files={QUESTIONS: "the questions", "images/test": "the pictures"},
    questions=questions,
    score=score,
    max_new_tokens=40,
    shown=100,
)
