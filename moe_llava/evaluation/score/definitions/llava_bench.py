"""LLaVA-Bench in the wild (Liu et al., arXiv 2304.08485): 60 open questions about 24 pictures, in conversation, in detail, complex.

A judge that reads a description of the picture gives two marks from 1 to 10: to the reference, an answer of GPT-4 that had the description,
and to ours. The score is the mean mark of ours as a percentage of the mean mark of the reference.

The wording of the judge's prompt is new here, so scores compare only within the same judge and this wording, not with published ones.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from moe_llava.evaluation.score.benchmark import Benchmark, Columns, Scored, share
from moe_llava.evaluation.score.judge import Judge
from moe_llava.evaluation.score.questions import Answers, Question, image_name, llava_questions
from moe_llava.evaluation.score.reading import BenchmarkError, numbered, read_json_lines, take, take_text

QUESTIONS = "questions.jsonl"
CATEGORIES = ("conv", "detail", "complex")
LOWEST, HIGHEST = 1, 10
# (reference, ours) if there is no answer, or no readable judgement.
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


def read_marks(reply: str) -> tuple[float, float] | None:
    """Read the first line as two numbers in range, with blanks or a comma between; None if it is anything else."""
    line = reply.strip().split("\n")[0].replace("*", "")
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)(?:\s*,\s*|\s+)([0-9]+(?:\.[0-9]+)?)[\s.]*", line)
    if not found:
        return None
    first, second = float(found[1]), float(found[2])
    return (first, second) if all(LOWEST <= mark <= HIGHEST for mark in (first, second)) else None


def check(folder: Path, questions: list[Question]) -> tuple[dict[str, str], dict[str, str]]:
    """Return (image -> its description, id of a question -> its reference answer). Raises BenchmarkError if a question lacks one."""
    descriptions = _texts(folder / "context.jsonl", "image", "caption")
    references = _texts(folder / "answers_gpt4.jsonl", "question_id", "text")
    for question in questions:
        where = f"question {question.id} of {folder / QUESTIONS}"
        category = take(question.extra, "category", where)
        if category not in CATEGORIES:
            raise BenchmarkError(f"{where} has the category {category!r}, but must have one of {', '.join(CATEGORIES)}")
        if not question.images or image_name(question, where) not in descriptions:
            raise BenchmarkError(f"{where} has no picture that context.jsonl describes")
        if question.id not in references:
            raise BenchmarkError(f"{where} has no answer in answers_gpt4.jsonl")
    return descriptions, references


def _texts(file: Path, key: str, value: str) -> dict[str, str]:
    """Return the texts of a file by key. A description may be a list of sentences."""
    found = {}
    for where, record in numbered(read_json_lines(file), "record", file, key):
        text = take(record, value, where)
        found[str(record[key])] = "\n".join(map(str, text)) if isinstance(text, list) else take_text(record, value, where)
    return found


def judge(folder: Path, questions: list[Question], answers: Answers, by: Judge) -> Scored:
    descriptions, references = check(folder, questions)
    prompts = [
        None
        if text is None
        else FORM.format(
            description=descriptions[image_name(question, question.id)],
            question=question.prompt,
            reference=references[question.id],
            ours=text,
        )
        for question, text in zip(questions, answers, strict=True)
    ]
    marks = by.opinions(prompts, TASK, read_marks, REMINDER)
    items = [
        {"id": question.id, "category": question.extra["category"], "given": text, "read": read}
        for question, text, read in zip(questions, answers, marks, strict=True)
    ]
    reference, ours = np.array([item["read"] or WORST for item in items]).reshape(-1, 2).T
    columns = {"category": np.array([item["category"] for item in items]), "reference": reference, "ours": ours}
    return Scored(items, columns, [question.unit for question in questions], _measure)


def _measure(columns: Columns, weights: np.ndarray) -> dict[str, float]:
    """Return percent of the reference."""
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
        QUESTIONS: "the questions",
        "context.jsonl": "what is on the pictures, for the judge",
        "answers_gpt4.jsonl": "the reference answers",
    },
    questions=partial(llava_questions, QUESTIONS, "images"),
    max_new_tokens=1024,
    judge=judge,
    check=check,
    headline=("all",),
)
