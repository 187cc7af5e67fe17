"""POPE (Li et al., arXiv 2305.10355): is there such an object? Asked about random objects, popular ones, and those that usually come with
what is there.

Published reading: of the text up to the first full stop, without commas, a word `No`, `no` or `not` between blanks means no; all else means
yes, so "NO" does, too. Lenient reading: the first word that says yes or no, in any case.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from moe_llava.evaluation.score.benchmark import (
    LENIENT,
    SINGLE_WORD,
    Benchmark,
    BenchmarkError,
    Columns,
    Question,
    Scored,
    first_image,
    llava_questions,
    plain,
    read_json_lines,
    share,
    take,
    take_text,
)
from moe_llava.evaluation.score.means import detection
from moe_llava.evaluation.score.reading import once

QUESTIONS = "llava_pope_test.jsonl"
CATEGORIES = ("random", "popular", "adversarial")


def questions(folder: Path) -> list[Question]:
    return llava_questions(folder / QUESTIONS, folder / "val2014")


def says_yes(text: str) -> bool:
    """As published."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def says_yes_leniently(text: str) -> bool | None:
    """None if it says neither."""
    for word in re.findall(r"[a-z']+", text.lower()):
        if word in ("yes", "yeah", "yep"):
            return True
        if word in ("no", "not", "none", "nope") or word.endswith("n't"):
            return False
    return None


def score(folder: Path, asked: list[Question], given: list[str | None]) -> Scored:
    labels = {category: _labels(folder / "coco" / f"coco_pope_{category}.json") for category in CATEGORIES}
    items = []
    for question, text in zip(asked, given, strict=True):
        where = f"question {question.id} of {folder / QUESTIONS}"
        category = take(question.extra, "category", where)
        key = (first_image(question, where).name, plain(question.prompt.removesuffix(SINGLE_WORD)))
        if category not in labels or key not in labels[category]:
            raise BenchmarkError(f"{where} has no label in coco_pope_{category}.json")
        truth = labels[category][key]
        # A missing answer counts as the wrong one.
        said = not truth if text is None else says_yes(text)
        leniently = not truth if text is None else says_yes_leniently(text)
        items.append(
            {"id": question.id, "category": category, "given": text, "read": said, "expected": truth, "right": said == truth}
            | {"leniently": (not truth) if leniently is None else leniently}
        )
    columns = {name: np.array([item[name] for item in items]) for name in ("category", "read", "expected", "leniently")}
    return Scored(items, columns, [question.images[0].name for question in asked], _measure)


def _labels(file: Path) -> dict[tuple[str, str], bool]:
    """(image, question) -> whether it is there."""
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
    """Fractions, as the published script prints them; means over the categories that were asked."""
    scores: dict[str, float] = {}
    categories = [category for category in CATEGORIES if category in columns["category"]]
    for suffix, read in (("", columns["read"]), (LENIENT, columns["leniently"])):
        for category in categories:
            kept = np.where(columns["category"] == category, weights, 0.0)
            truth = columns["expected"]
            number = float(kept.sum())
            precision, recall, f1 = detection(kept, read, truth)
            found = {
                "accuracy": share(float(kept[read == truth].sum()), number),
                "precision": precision,
                "recall": recall,
                "f1": f1,
                "yes": share(float(kept[read].sum()), number),
            }
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
    questions=questions,
    score=score,
    headline=("f1",),
)
