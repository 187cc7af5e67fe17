"""MM-Vet (Yu et al., arXiv 2308.02490): 218 open questions that each need one or several of six capabilities: recognition (rec), text
(ocr), knowledge (know), generation (gen), space (spat), mathematics (math).

A judge says how much of the expected answer is in the given one, from 0.0 to 1.0. The score is the mean, in percent: of all, of the
questions that need a capability, of those that need one combination of them. `upload` writes the answers in the form that the authors' own
evaluator reads.

What the judge is asked here is worded anew, so scores compare only within the same judge and this wording, not with published ones.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from moe_llava.evaluation.score.benchmark import Benchmark, BenchmarkError, Columns, Question, Scored, llava_questions, share, take
from moe_llava.evaluation.score.judge import Judge, Messages
from moe_llava.evaluation.score.reading import read_object

QUESTIONS, TRUTH = "llava-mm-vet.jsonl", "mm-vet.json"

TASK = """You check answers against the expected ones. Only what they say counts, not how they say it."""
FORM = """Question:
{question}

Expected answer:
{expected}

Given answer:
{given}

How much of the expected answer does the given one get right? Where the expected answer has parts with <AND> between them, all of them \
are needed, and each counts for its share. Where it has <OR> between them, any one of them is enough for all. What the given answer says \
wrongly counts against it. Reply with one number and nothing else: 0.0 for nothing, 1.0 for everything, or a tenth between."""
REMINDER = "Your reply must be one number from 0.0 to 1.0 and nothing else."


def questions(folder: Path) -> list[Question]:
    return llava_questions(folder / QUESTIONS, folder / "images")


def read_share(reply: str) -> float | None:
    """The first line as a number from 0 to 1; None if it is anything else."""
    line = reply.strip().split("\n")[0].replace("*", "").strip().rstrip(".")
    return float(line) if re.fullmatch(r"0|0?\.[0-9]+|1|1\.0+", line) else None


def check(folder: Path, asked: list[Question]) -> list[tuple[str, list[str]]]:
    """Return, for each question, the expected answer and the capabilities it needs. Raise BenchmarkError if one has none."""
    records = read_object(folder / TRUTH)
    return [_truth(folder, records, question) for question in asked]


def judge(folder: Path, asked: list[Question], given: list[str | None], by: Judge) -> Scored:
    truth = check(folder, asked)
    answered = [number for number, text in enumerate(given) if text is not None]
    conversations = [_conversation(asked[number].prompt, truth[number][0], str(given[number])) for number in answered]
    shares = dict(zip(answered, by.ask(conversations, read_share, REMINDER), strict=True))
    items = [
        {"id": question.id, "given": text, "read": shares.get(number), "expected": expected, "capabilities": capabilities}
        for number, (question, text, (expected, capabilities)) in enumerate(zip(asked, given, truth, strict=True))
    ]
    columns = {"share": np.array([item["read"] or 0.0 for item in items])}
    names = sorted({name for _, capabilities in truth for name in capabilities})
    columns |= {f"capability/{name}": np.array([name in capabilities for _, capabilities in truth]) for name in names}
    needed = ["+".join(capabilities) for _, capabilities in truth]
    columns |= {f"combination/{name}": np.array([name == other for other in needed]) for name in sorted(set(needed))}
    units = [question.images[0].name if question.images else question.id for question in asked]
    return Scored(items, columns, units, _measure)


def _truth(folder: Path, records: dict[str, Any], question: Question) -> tuple[str, list[str]]:
    """The expected answer, and the capabilities it needs, by name."""
    key = f"v1_{question.id}"
    if not isinstance(records.get(key), dict):
        raise BenchmarkError(f"{folder / TRUTH} has no entry {key!r} for question {question.id} of {folder / QUESTIONS}")
    where = f"{key} of {folder / TRUTH}"
    expected, capabilities = (take(records[key], name, where) for name in ("answer", "capability"))
    if not isinstance(capabilities, list) or not capabilities:
        raise BenchmarkError(f"{where} has the capability {capabilities!r}, but must have a list of names")
    return re.sub(r"\s*<(AND|OR)>\s*", r" <\1> ", str(expected)), sorted({str(name) for name in capabilities})


def _conversation(question: str, expected: str, given: str) -> Messages:
    return [
        {"role": "system", "content": TASK},
        {"role": "user", "content": FORM.format(question=question, expected=expected, given=given)},
    ]


def _measure(columns: Columns, weights: np.ndarray) -> dict[str, float]:
    """Percent."""
    chosen = {"total": weights} | {name: weights * column for name, column in columns.items() if name != "share"}
    return {name: 100 * share(float((columns["share"] * kept).sum()), float(kept.sum())) for name, kept in chosen.items()}


def upload(folder: Path, asked: list[Question], given: list[str | None], out: Path) -> list[Path]:
    """One JSON object, v1_<id> -> answer, "" where there is none."""
    file = out / "mm-vet.json"
    answers = {f"v1_{question.id}": text or "" for question, text in zip(asked, given, strict=True)}
    file.write_text(json.dumps(answers, indent=1), encoding="utf-8")
    return [file]


BENCHMARK = Benchmark(
    name="mm-vet",
    title="MM-Vet",
    folder="mm-vet",
    files={QUESTIONS: "the questions", TRUTH: "the expected answers, and what each needs"},
    questions=questions,
    upload=upload,
    max_new_tokens=1024,
    judge=judge,
    check=check,
    headline=("total",),
)
