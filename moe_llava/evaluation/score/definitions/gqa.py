"""GQA (Hudson and Manning, arXiv 1902.09506), balanced test-dev questions: made from scene graphs, with one short answer each.

Published reading: without full stops at its end and in lower case, an answer must be the expected one. Lenient reading: both are normalised
as EvalAI does, so that "a dog" is "dog". In percent; binary questions are those whose answer is no name (`query`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from moe_llava.evaluation.score.benchmark import Benchmark, Scored, find_file, upload_each
from moe_llava.evaluation.score.means import mean_by
from moe_llava.evaluation.score.normalise import evalai
from moe_llava.evaluation.score.questions import Answers, Question, llava_questions
from moe_llava.evaluation.score.reading import BenchmarkError, read_object, take, take_list, take_text

QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
TRUTH = "data/testdev_balanced_questions.json | testdev_balanced_questions.json"
# Steps of a question's program that only end it or name an object do not count.
NO_STEPS = ("exist", "query: name", "choose name")


def read_answer(text: str) -> str:
    """Read an answer as published."""
    return text.rstrip(".").lower()


def score(folder: Path, questions: list[Question], answers: Answers) -> Scored:
    file = find_file(folder, TRUTH)
    truth = read_object(file)
    items, units = [], []
    for question, text in zip(questions, answers, strict=True):
        where = f"question {question.id} of {file}"
        if question.id not in truth:
            raise BenchmarkError(f"question {question.id} of {folder / QUESTIONS} is not in {file}")
        if take(truth[question.id], "isBalanced", where):
            items.append({"id": question.id} | _item(truth[question.id], text, where))
            units.append(question.unit)
    # The number of steps is known only if the file has the questions' programs.
    steps = ("steps",) if all(item["steps"] is not None for item in items) else ()
    return mean_by(items, ("answers", "structural", "semantic", "words", *steps), units)


def _item(record: dict[str, Any], text: str | None, where: str) -> dict[str, Any]:
    expected, types = take_text(record, "answer", where), take(record, "types", where)
    structural = take_text(types, "structural", where)
    read = None if text is None else read_answer(text)
    return {
        "given": text,
        "read": read,
        "expected": expected,
        "right": read == expected,
        "leniently": text is not None and (read == expected or evalai(text) == evalai(expected)),
        "answers": "open" if structural == "query" else "binary",
        "structural": structural,
        "semantic": take_text(types, "semantic", where),
        "words": len(take_text(record, "question", where).split()),
        "steps": _count_steps(take_list(record, "semantic", where), where) if "semantic" in record else None,
    }


def _count_steps(program: list[dict[str, Any]], where: str) -> int:
    steps = [f"{take(step, 'operation', where)}: {take(step, 'argument', where)}" for step in program]
    return sum(not any(name in step for name in NO_STEPS) for step in steps)


BENCHMARK = Benchmark(
    name="gqa",
    title="GQA",
    folder="gqa",
    files={QUESTIONS: "the questions", TRUTH: "their answers and types"},
    questions=partial(llava_questions, QUESTIONS, "data/images"),
    score=score,
    # As the published script reads it.
    upload=upload_each(
        "testdev_balanced_predictions.json", lambda question, text: {"questionId": question.id, "prediction": read_answer(text)}
    ),
)
