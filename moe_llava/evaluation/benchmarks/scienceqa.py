"""ScienceQA (Lu et al., arXiv 2209.09513): school questions with two to five options, about half of them with an image.

Published reading, as in LLaVA: a letter A to E alone, or one before ". ", or exactly one "The answer is X." where any character may be the
last. IMG-accuracy is over questions with an image. The paper's tables give accuracy by subject, context and grade.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moe_llava.evaluation.benchmark import LETTER, Benchmark, BenchmarkError, Question, Scored, read_json, take
from moe_llava.evaluation.choices import judged, lettered, scored

QUESTIONS, PROBLEMS, SPLITS = "llava_test_CQM-A.json", "problems.json", "pid_splits.json"


def questions(folder: Path) -> list[Question]:
    file = folder / QUESTIONS
    found = []
    for number, record in enumerate(read_json(file), start=1):
        where = f"record {number} of {file}"
        identity, turns, image = str(take(record, "id", where)), take(record, "conversations", where), record.get("image")
        if not turns:
            raise BenchmarkError(f"{where} has no turns in 'conversations'")
        prompt = take(turns[0], "value", where).replace("<image>", "").strip() + LETTER
        found.append(Question(identity, prompt, (folder / "images" / "test" / image,) if image else ()))
    return found


def read(text: str) -> str | None:
    """As published: the letter may be none of the question's options."""
    if re.fullmatch(r"[A-E]", text):
        return text
    if re.match(r"[A-E]\. ", text):
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def score(folder: Path, asked: list[Question], given: list[str | None]) -> Scored:
    problems, file = read_json(folder / PROBLEMS), folder / PROBLEMS
    _check_split(folder)
    items, groups = [], []
    for question, text in zip(asked, given, strict=True):
        if question.id not in problems:
            raise BenchmarkError(f"{file} has no problem {question.id}, which {QUESTIONS} asks about")
        problem, where = problems[question.id], f"problem {question.id} of {file}"
        options = lettered(take(problem, "choices", where))
        answer = take(problem, "answer", where)
        expected = dict(enumerate(options)).get(answer, answer)
        items.append(judged(question, text, None if text is None else read(text), options, expected, file))
        groups.append(["accuracy"] + ["IMG-accuracy"] * bool(question.images) + _parts(problem, where))
    return scored(items, groups, [question.id for question in asked])


def _check_split(folder: Path) -> None:
    """Accuracy is over the whole test split, of which the question file must have all, whatever was asked."""
    split = set(take(read_json(folder / SPLITS), "test", str(folder / SPLITS)))
    different = sorted(split ^ {question.id for question in questions(folder)})
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
    return [
        f"subject/{take(problem, 'subject', where)}",
        *(contexts or ["context/none"]),
        "grade/1-6" if int(year[1]) <= 6 else "grade/7-12",
    ]


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
