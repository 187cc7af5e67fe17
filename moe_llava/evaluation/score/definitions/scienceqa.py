"""ScienceQA (Lu et al., arXiv 2209.09513): school questions with two to five options, about half of them with an image.

Published reading, as in LLaVA: a letter A to E alone, or one before ". ", or exactly one "The answer is X." where any character may be the
last. IMG-accuracy is over questions with an image. The paper's tables give accuracy by subject, context and grade.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moe_llava.evaluation.score.benchmark import Benchmark, Scored
from moe_llava.evaluation.score.choices import judged, lettered
from moe_llava.evaluation.score.means import mean_by_group
from moe_llava.evaluation.score.questions import LETTER, Answers, Question
from moe_llava.evaluation.score.reading import BenchmarkError, numbered, once, read_list, read_object, take, take_list, take_text

QUESTIONS, PROBLEMS, SPLITS = "llava_test_CQM-A.json", "problems.json", "pid_splits.json"


def questions(folder: Path) -> list[Question]:
    found = []
    for where, record in numbered(read_list(folder / QUESTIONS), "record", folder / QUESTIONS, "id"):
        turns = take_list(record, "conversations", where)
        image = take_text(record, "image", where) if record.get("image") is not None else ""
        if not turns:
            raise BenchmarkError(f"{where} has no turns in 'conversations'")
        prompt = take_text(turns[0], "value", where).replace("<image>", "").strip() + LETTER
        found.append(Question(str(record["id"]), prompt, (folder / "images" / "test" / image,) if image else ()))
    return found


def read(text: str) -> str | None:
    """Read a letter as published; it may be none of the question's options."""
    if re.fullmatch(r"[A-E]", text):
        return text
    if re.match(r"[A-E]\. ", text):
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def score(folder: Path, questions: list[Question], answers: Answers) -> Scored:
    problems, file = read_object(folder / PROBLEMS), folder / PROBLEMS
    _check_split(folder)
    items, groups = [], []
    for question, text in zip(questions, answers, strict=True):
        if question.id not in problems:
            raise BenchmarkError(f"{file} has no problem {question.id}, which is a question of {QUESTIONS}")
        problem, where = problems[question.id], f"problem {question.id} of {file}"
        options = lettered(take_list(problem, "choices", where))
        answer = take(problem, "answer", where)
        expected = next((letter for index, letter in enumerate(options) if index == answer), answer)
        items.append(judged(question, text, lambda text, _: read(text), options, expected, file))
        groups.append(["accuracy"] + ["IMG-accuracy"] * bool(question.images) + _parts(problem, where))
    return mean_by_group(items, groups, [question.id for question in questions])


def _check_split(folder: Path) -> None:
    """Raise BenchmarkError unless the question file has the whole test split, which accuracy is defined over."""
    file = folder / SPLITS
    split: dict[str, str] = {}
    for number, identity in enumerate(take_list(read_object(file), "test", str(file)), start=1):
        once(split, "id", str(identity), f"number {number} of 'test' in {file}")
    different = sorted(split.keys() ^ {question.id for question in questions(folder)})
    if different:
        raise BenchmarkError(
            f"{folder / QUESTIONS} and the test split in {SPLITS} must have the same questions, but {len(different)} are in one only, "
            f"such as {', '.join(different[:5])}"
        )


def _parts(problem: dict[str, Any], where: str) -> list[str]:
    hint, image, grade = (take(problem, key, where) for key in ("hint", "image", "grade"))
    year = re.fullmatch(r"grade(\d+)", str(grade))
    if year is None or not 1 <= int(year[1]) <= 12:
        raise BenchmarkError(f"{where} has the grade {grade!r}, but must have grade1 to grade12")
    contexts = ["context/text"] * bool(hint) + ["context/image"] * bool(image)
    subject, years = f"subject/{take(problem, 'subject', where)}", "grade/1-6" if int(year[1]) <= 6 else "grade/7-12"
    return [subject, *(contexts or ["context/none"]), years]


BENCHMARK = Benchmark(
    name="scienceqa",
    title="ScienceQA",
    folder="scienceqa",
    files={QUESTIONS: "the questions", PROBLEMS: "options, answers and what they are about", SPLITS: "which of them are for testing"},
    questions=questions,
    score=score,
    headline=("IMG-accuracy",),
    max_new_tokens=1024,
)
