"""The digits world's own benchmark: questions about unseen handwriting, right to the letter, per family; existence as POPE (Li et al.,
arXiv 2305.10355) scores it, for each kind of negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moe_llava.common.errors import DataError
from moe_llava.data.records import parse_record
from moe_llava.evaluation.score.benchmark import Benchmark, BenchmarkError, Columns, Question, Scored, first_image, share, take
from moe_llava.evaluation.score.means import detection
from moe_llava.evaluation.score.reading import once, read_list
from moe_llava.evaluation.score.statistics import bootstrap_mean

QUESTIONS = "test.json"
POSITIVE = "positive"


def questions(folder: Path) -> list[Question]:
    file = folder / QUESTIONS
    found = []
    seen: dict[str, str] = {}
    for number, item in enumerate(read_list(file), start=1):
        where = f"record {number} of {file}"
        try:
            record = parse_record(where, item, folder / "images")
        except DataError as error:
            raise BenchmarkError(str(error)) from error
        prompt, expected = record.turns[0]
        extra = {key: take(record.extra, key, where) for key in ("family", "kind")} | {"answer": expected}
        images = tuple(image for image in record.images if isinstance(image, Path))
        found.append(Question(str(take(record.extra, "id", where)), prompt, images, extra))
        once(seen, "id", found[-1].id, where)
        first_image(found[-1], where)
    return found


def judge(question: Question, text: str | None) -> dict[str, Any]:
    """The item of one question and its answer."""
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


def score(folder: Path, asked: list[Question], given: list[str | None]) -> Scored:
    items = [judge(question, text) for question, text in zip(asked, given, strict=True)]
    return Scored(items, _columns(items), [item["image"] for item in items], _measure)


def _columns(items: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """`about <kind>`: the questions that judge a kind of negative. As in POPE these are as many to affirm as to deny: about the same
    pictures."""
    truth = np.array([item["expected"] == "yes" for item in items])
    said = np.array([item["given"] == "yes" for item in items])
    missing = np.array([item["given"] is None for item in items])
    columns = {
        "family": np.array([item["family"] for item in items]),
        "right": np.array([item["right"] for item in items]),
        "truth": truth,
        "said": np.where(missing, ~truth, said),  # what is not "yes" counts as no, a missing answer as the wrong one
    }
    existence = [item for item in items if item["family"] == "existence"]
    for kind in sorted({item["kind"] for item in existence} - {POSITIVE}):
        pictures = {item["image"] for item in existence if item["kind"] == kind}
        columns[f"about {kind}"] = np.array(
            [
                item["family"] == "existence" and (item["kind"] == kind or (item["kind"] == POSITIVE and item["image"] in pictures))
                for item in items
            ]
        )
    return columns


def _measure(columns: Columns, weights: np.ndarray) -> dict[str, float]:
    """Fractions."""
    right = weights * columns["right"]
    scores = {"accuracy": share(right.sum(), weights.sum())}
    for family in dict.fromkeys(columns["family"].tolist()):
        here = columns["family"] == family
        scores[f"{family}/accuracy"] = share(right[here].sum(), weights[here].sum())
    for kind in _kinds(columns):
        scores |= {f"existence/{kind}/{name}": value for name, value in _yes_or_no(columns, weights, kind).items()}
    return scores


def _kinds(columns: Columns) -> list[str]:
    return [name.removeprefix("about ") for name in columns if name.startswith("about ")]


def _yes_or_no(columns: Columns, weights: np.ndarray, kind: str) -> dict[str, float]:
    kept, said, truth = weights * columns[f"about {kind}"], columns["said"], columns["truth"]
    number = kept.sum()
    precision, recall, f1 = detection(kept, said, truth)
    return {
        "accuracy": share(kept[said == truth].sum(), number),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_share": share(kept[said].sum(), number),
    }


def accuracy(items: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per family, and over "all": mean, low, high (95%), n."""
    families = {"all": list(items)}
    for item in items:
        families.setdefault(item["family"], []).append(item)
    return {
        family: asdict(bootstrap_mean([float(item["right"]) for item in members], [item["image"] for item in members]))
        for family, members in families.items()
    }


def existence(items: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each kind of negative: accuracy, precision, recall, F1, share of yes, n."""
    columns, ones = _columns(items), np.ones(len(items))
    return {kind: _yes_or_no(columns, ones, kind) | {"n": int(columns[f"about {kind}"].sum())} for kind in _kinds(columns)}


def compare(items: Sequence[dict[str, Any]], control: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The difference in accuracy between two checkpoints that answered the same questions: mean, low, high (95%), n. Pairing the answers
    takes out what the two have in common, which two separate intervals do not."""
    differences = [float(a["right"]) - float(b["right"]) for a, b in zip(items, control, strict=True)]
    return asdict(bootstrap_mean(differences, [item["image"] for item in items]))


BENCHMARK = Benchmark(
    name="digits",
    title="The digits world",
    folder="digits/data",  # as `moe-llava digits` writes it
    files={QUESTIONS: "the questions", "images/test": "the pictures"},
    questions=questions,
    score=score,
    headline=("accuracy",),
    max_new_tokens=40,
)
