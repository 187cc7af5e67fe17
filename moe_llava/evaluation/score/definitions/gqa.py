"""GQA (Hudson and Manning, arXiv 1902.09506), balanced test-dev questions: made from scene graphs, with one short answer each.

Published reading: without full stops at its end and in lower case, an answer must be the expected one. Lenient reading: both are normalised
as EvalAI does, so that "a dog" is "dog". In percent; binary questions are those that do not ask for a name (`query`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_llava.evaluation.score.benchmark import (
    Benchmark,
    BenchmarkError,
    Question,
    Scored,
    find_file,
    llava_questions,
    take,
    take_list,
    take_text,
)
from moe_llava.evaluation.score.means import mean_by
from moe_llava.evaluation.score.normalise import evalai
from moe_llava.evaluation.score.reading import read_object

QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
TRUTH = "data/testdev_balanced_questions.json | testdev_balanced_questions.json"
# Steps of a question's program that only end it, or say what there is, are none of its length.
NO_STEPS = ("exist", "query: name", "choose name")


def questions(folder: Path) -> list[Question]:
    return llava_questions(folder / QUESTIONS, folder / "data" / "images")


def read_answer(text: str) -> str:
    """As published."""
    return text.rstrip(".").lower()


def score(folder: Path, asked: list[Question], given: list[str | None]) -> Scored:
    file = find_file(folder, TRUTH)
    truth = read_object(file)
    items, units = [], []
    for question, text in zip(asked, given, strict=True):
        where = f"question {question.id} of {file}"
        if question.id not in truth:
            raise BenchmarkError(f"question {question.id} of {folder / QUESTIONS} is not in {file}")
        record = truth[question.id]
        if take(record, "isBalanced", where):
            items.append({"id": question.id} | _item(record, text, where))
            units.append(str(question.images[0]) if question.images else question.id)
    # Only files with the questions' programs tell how many steps they take.
    steps = ("steps",) if all(item["steps"] is not None for item in items) else ()
    return mean_by(items, ("answers", "structural", "semantic", "words", *steps), units)


def _item(record: dict[str, Any], text: str | None, where: str) -> dict[str, Any]:
    expected, types = take_text(record, "answer", where), take(record, "types", where)
    structural = take_text(types, "structural", where)
    return {
        "given": text,
        "read": None if text is None else read_answer(text),
        "expected": expected,
        "right": text is not None and read_answer(text) == expected,
        "leniently": text is not None and (read_answer(text) == expected or evalai(text) == evalai(expected)),
        "answers": "open" if structural == "query" else "binary",
        "structural": structural,
        "semantic": take_text(types, "semantic", where),
        "words": len(take_text(record, "question", where).split()),
        "steps": _steps(take_list(record, "semantic", where), where) if "semantic" in record else None,
    }


def _steps(program: list[dict[str, Any]], where: str) -> int:
    """Of reasoning."""
    steps = [f"{take(step, 'operation', where)}: {take(step, 'argument', where)}" for step in program]
    return sum(not any(name in step for name in NO_STEPS) for step in steps)


def upload(folder: Path, asked: list[Question], given: list[str | None], out: Path) -> list[Path]:
    """`testdev_balanced_predictions.json`, as the published script reads it; "" for a question without an answer."""
    file = out / "testdev_balanced_predictions.json"
    out.mkdir(parents=True, exist_ok=True)
    answers = zip(asked, given, strict=True)
    file.write_text(json.dumps([{"questionId": question.id, "prediction": read_answer(text or "")} for question, text in answers]))
    return [file]


BENCHMARK = Benchmark(
    name="gqa",
    title="GQA",
    folder="gqa",
    files={QUESTIONS: "the questions", TRUTH: "their answers and types"},
    questions=questions,
    score=score,
    headline=("accuracy",),
    upload=upload,
)
