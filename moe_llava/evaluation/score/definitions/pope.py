"""POPE (Li et al., arXiv 2305.10355): does the picture show an object? There are questions about random objects, popular ones, and those
that usually come with what the picture shows.

Published reading: of the text up to the first full stop, without commas, a word `No`, `no` or `not` between blanks means no; all else means
yes, so "NO" does, too. Lenient reading: the first word that says yes or no, in any case.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from moe_llava.evaluation.score.benchmark import LENIENT, Benchmark, Columns, Scored, share
from moe_llava.evaluation.score.means import yes_or_no
from moe_llava.evaluation.score.metrics import says_yes_leniently
from moe_llava.evaluation.score.questions import SINGLE_WORD, Answers, Question, image_name, llava_questions, plain
from moe_llava.evaluation.score.reading import BenchmarkError, once, read_json_lines, take, take_text

QUESTIONS = "llava_pope_test.jsonl"
CATEGORIES = ("random", "popular", "adversarial")


def says_yes(text: str) -> bool:
    """Read an answer as published."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def score(folder: Path, questions: list[Question], answers: Answers) -> Scored:
    labels = {category: _labels(folder / "coco" / f"coco_pope_{category}.json") for category in CATEGORIES}
    items = []
    for question, text in zip(questions, answers, strict=True):
        where = f"question {question.id} of {folder / QUESTIONS}"
        category = take(question.extra, "category", where)
        key = (image_name(question, where), plain(question.prompt.removesuffix(SINGLE_WORD)))
        if category not in labels or key not in labels[category]:
            raise BenchmarkError(f"{where} has no label in coco_pope_{category}.json")
        truth = labels[category][key]
        # A missing answer counts as the wrong one, and so does one that says neither.
        read = not truth if text is None else says_yes(text)
        leniently = None if text is None else says_yes_leniently(text)
        items.append(
            {"id": question.id, "category": category, "given": text, "read": read, "expected": truth, "right": read == truth}
            | {"leniently": (not truth) if leniently is None else leniently}
        )
    columns = {name: np.array([item[name] for item in items]) for name in ("category", "read", "expected", "leniently")}
    return Scored(items, columns, [question.unit for question in questions], _measure)


def _labels(file: Path) -> dict[tuple[str, str], bool]:
    """Return (image, question) -> whether the object is there."""
    labels: dict[tuple[str, str], bool] = {}
    ids: dict[str, str] = {}
    for number, record in enumerate(read_json_lines(file), start=1):
        where = f"line {number} of {file}"
        label = take(record, "label", where)
        if label not in ("yes", "no"):
            raise BenchmarkError(f"{where} has the label {label!r}, but must have yes or no")
        if "question_id" in record:
            once(ids, "question_id", str(record["question_id"]), where)
        key = (take_text(record, "image", where), plain(take_text(record, "text", where)))
        if labels.setdefault(key, label == "yes") != (label == "yes"):
            raise BenchmarkError(f"{where} has the label {label!r} for {key[1]!r} about {key[0]}, which had the other label before")
    return labels


def _measure(columns: Columns, weights: np.ndarray) -> dict[str, float]:
    """Return fractions, as the published script prints them, and means over the categories that have questions."""
    scores: dict[str, float] = {}
    categories = [category for category in CATEGORIES if category in columns["category"]]
    for suffix, read in (("", columns["read"]), (LENIENT, columns["leniently"])):
        for category in categories:
            found = yes_or_no(np.where(columns["category"] == category, weights, 0.0), read, columns["expected"])
            scores |= {f"{category}/{name}{suffix}": value for name, value in found.items()}
        for name in ("accuracy", "f1"):
            total = sum(scores[f"{category}/{name}{suffix}"] for category in categories)
            scores[f"{name}{suffix}"] = share(total, len(categories))
    return scores


BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    folder="pope",
    files={
        QUESTIONS: "the questions",
        **{f"coco/coco_pope_{category}.json": f"the labels of the {category} ones" for category in CATEGORIES},
    },
    questions=partial(llava_questions, QUESTIONS, "val2014"),
    score=score,
    headline=("f1",),
    shown=100,
)
