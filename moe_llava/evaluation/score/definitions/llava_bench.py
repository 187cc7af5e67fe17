"""LLaVA-Bench in the wild (Liu et al., arXiv 2304.08485): 60 open questions about 24 pictures, in conversation, in detail, complex.

A judge that reads a description of the picture gives two marks from 1 to 10: to the reference, an answer of GPT-4 that had the description,
and to ours. The score is the mean mark of ours as a percentage of the mean mark of the reference.

What the judge is asked here is worded anew, so scores compare only within the same judge and this wording, not with published ones.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from moe_llava.evaluation.score.benchmark import (
    Benchmark,
    BenchmarkError,
    Columns,
    Question,
    Scored,
    llava_questions,
    read_json_lines,
    share,
    take,
    take_text,
)
from moe_llava.evaluation.score.judge import Judge, Messages
from moe_llava.evaluation.score.reading import once

CATEGORIES = ("conv", "detail", "complex")
LOWEST, HIGHEST = 1, 10
# (reference, ours) where there is no answer, or no judgement that can be read: nothing against all.
WORST = (float(HIGHEST), 0.0)

TASK = """You mark answers to questions about a picture. You do not see the picture; you are told what is on it, and may rely on that."""
FORM = """What is on the picture:
{description}

The question:
{question}

Answer A:
{reference}

Answer B:
{ours}

Mark both answers from 1 (of no use) to 10 (as good as can be): are they right, to the point, helpful, and as detailed as the question \
wants? Which of them comes first must not matter. Begin with a line that holds the mark of A, a blank, the mark of B, and nothing else, \
such as "4 6". Give your reasons below it."""
REMINDER = "Your first line must hold two numbers from 1 to 10 and nothing else."


def questions(folder: Path) -> list[Question]:
    return llava_questions(folder / "questions.jsonl", folder / "images")


def read_marks(reply: str) -> tuple[float, float] | None:
    """The first line as two numbers in range with blanks or a comma between; None if it is anything else."""
    line = reply.strip().split("\n")[0].replace("*", "")
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)(?:\s*,\s*|\s+)([0-9]+(?:\.[0-9]+)?)[\s.]*", line)
    if not found:
        return None
    first, second = float(found[1]), float(found[2])
    return (first, second) if all(LOWEST <= mark <= HIGHEST for mark in (first, second)) else None


def check(folder: Path, asked: list[Question]) -> tuple[dict[str, str], dict[str, str]]:
    """Return (image -> its description, id of a question -> its reference answer). Raise BenchmarkError if a question lacks one."""
    descriptions = _by(folder / "context.jsonl", "image", "caption")
    references = _by(folder / "answers_gpt4.jsonl", "question_id", "text")
    for question in asked:
        category = take(question.extra, "category", f"question {question.id} of {folder / 'questions.jsonl'}")
        if category not in CATEGORIES:
            raise BenchmarkError(
                f"question {question.id} of {folder / 'questions.jsonl'} has the category {category!r}, but must have one of "
                + ", ".join(CATEGORIES)
            )
        if not question.images or question.images[0].name not in descriptions:
            raise BenchmarkError(f"question {question.id} of {folder / 'questions.jsonl'} has no picture that context.jsonl describes")
        if question.id not in references:
            raise BenchmarkError(f"question {question.id} of {folder / 'questions.jsonl'} has no answer in answers_gpt4.jsonl")
    return descriptions, references


def judge(folder: Path, asked: list[Question], given: list[str | None], by: Judge) -> Scored:
    descriptions, references = check(folder, asked)
    answered = [number for number, text in enumerate(given) if text is not None]
    conversations = [
        _conversation(descriptions[asked[number].images[0].name], asked[number].prompt, references[asked[number].id], str(given[number]))
        for number in answered
    ]
    marks = dict(zip(answered, by.ask(conversations, read_marks, REMINDER), strict=True))
    items = [
        {"id": question.id, "category": question.extra["category"], "given": text, "read": marks.get(number)}
        for number, (question, text) in enumerate(zip(asked, given, strict=True))
    ]
    reference, ours = np.array([item["read"] or WORST for item in items]).reshape(-1, 2).T
    columns = {"category": np.array([item["category"] for item in items]), "reference": reference, "ours": ours}
    return Scored(items, columns, [question.images[0].name for question in asked], _measure)


def _by(file: Path, key: str, value: str) -> dict[str, str]:
    """Texts of a file by key. A description may be a list of sentences."""
    found = {}
    seen: dict[str, str] = {}
    for number, record in enumerate(read_json_lines(file), start=1):
        where = f"record {number} of {file}"
        text, name = take(record, value, where), str(take(record, key, where))
        once(seen, key, name, where)
        found[name] = "\n".join(map(str, text)) if isinstance(text, list) else take_text(record, value, where)
    return found


def _conversation(description: str, question: str, reference: str, ours: str) -> Messages:
    form = FORM.format(description=description, question=question, reference=reference, ours=ours)
    return [{"role": "system", "content": TASK}, {"role": "user", "content": form}]


def _measure(columns: Columns, weights: np.ndarray) -> dict[str, float]:
    """Percent of the reference."""
    scores = {}
    for category in ("all", *CATEGORIES):
        chosen = columns["category"] == category if category != "all" else np.ones(len(weights), dtype=bool)
        if chosen.any():
            ours, reference = (float((columns[name] * weights)[chosen].sum()) for name in ("ours", "reference"))
            scores[category] = 100 * share(ours, reference)
    return scores


BENCHMARK = Benchmark(
    name="llava-bench",
    title="LLaVA-Bench (in the wild)",
    folder="llava-bench-in-the-wild",
    files={
        "questions.jsonl": "the questions",
        "context.jsonl": "what is on the pictures, for the judge",
        "answers_gpt4.jsonl": "the reference answers",
    },
    questions=questions,
    max_new_tokens=1024,
    judge=judge,
    check=check,
    headline=("all",),
)
