"""ScienceQA (Lu et al., arXiv 2209.09513): school questions with two to five options, about half of them with an image.

Published reading, as in LLaVA: a letter A to E alone, or one before ". ", or exactly one "The answer is X." where any character may be the
last. IMG-accuracy is over questions with an image. The paper's tables give accuracy by subject, context and grade.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moe_llava.evaluation.score.benchmark import LETTER, Benchmark, BenchmarkError, Question, Scored, take, take_list, take_text
from moe_llava.evaluation.score.choices import judged, lettered, scored
from moe_llava.evaluation.score.reading import once, read_list, read_object

QUESTIONS, PROBLEMS, SPLITS = "llava_test_CQM-A.json", "problems.json", "pid_splits.json"


def questions(folder: Path) -> list[Question]:
    file = folder / QUESTIONS
    found = []
    seen: dict[str, str] = {}
    for number, record in enumerate(read_list(file), start=1):
        where = f"record {number} of {file}"
        identity, turns = str(take(record, "id", where)), take_list(record, "conversations", where)
        image = take_text(record, "image", where) if record.get("image") is not None else ""
        once(seen, "id", identity, where)
        if not turns:
            raise BenchmarkError(f"{where} has no turns in 'conversations'")
        prompt = take_text(turns[0], "value", where).replace("<image>", "").strip() + LETTER
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
    problems, file = read_object(folder / PROBLEMS), folder / PROBLEMS
    _check_split(folder)
    items, groups = [], []
    for question, text in zip(asked, given, strict=True):
        if question.id not in problems:
            raise BenchmarkError(f"{file} has no problem {question.id}, which {QUESTIONS} asks about")
        problem, where = problems[question.id], f"problem {question.id} of {file}"
        options = lettered(take_list(problem, "choices", where))
        answer = take(problem, "answer", where)
        expected = next((letter for index, letter in enumerate(options) if index == answer), answer)
        items.append(judged(question, text, None if text is None else read(text), options, expected, file))
        groups.append(["accuracy"] + ["IMG-accuracy"] * bool(question.images) + _parts(problem, where))
    return scored(items, groups, [question.id for question in asked])


def _check_split(folder: Path) -> None:
    """Accuracy is over the whole test split, of which the question file must have all, whatever was asked."""
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
