"""MM-Vet (Yu et al., arXiv 2308.02490): 218 open questions that each need one or several of six capabilities: recognition (rec), text
(ocr), knowledge (know), generation (gen), space (spat), mathematics (math).

A judge says how much of the expected answer is in the model's, from 0.0 to 1.0. The score is the mean, in percent: of all questions, of
those that need a capability, and of those that need one combination of them. `upload` writes the answers for the authors' own evaluator.

The wording of the judge's prompt is new here, so scores compare only within the same judge and this wording, not with published ones.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from moe_llava.evaluation.score.benchmark import Benchmark, Scored, write_json
from moe_llava.evaluation.score.judge import Judge
from moe_llava.evaluation.score.means import mean_by_group
from moe_llava.evaluation.score.questions import Answers, Question, llava_questions
from moe_llava.evaluation.score.reading import BenchmarkError, read_object, take

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


def read_share(reply: str) -> float | None:
    """Read the first line as a number from 0 to 1; None if it is anything else."""
    line = reply.strip().split("\n")[0].replace("*", "").strip().rstrip(".")
    return float(line) if re.fullmatch(r"0|0?\.[0-9]+|1|1\.0+", line) else None


def check(folder: Path, questions: list[Question]) -> list[tuple[str, list[str]]]:
    """Return the expected answer of each question and the capabilities it needs. Raises BenchmarkError if a question has none."""
    records = read_object(folder / TRUTH)
    return [_truth(folder, records, question) for question in questions]


def _truth(folder: Path, records: dict[str, Any], question: Question) -> tuple[str, list[str]]:
    key = f"v1_{question.id}"
    if not isinstance(records.get(key), dict):
        raise BenchmarkError(f"{folder / TRUTH} has no entry {key!r} for question {question.id} of {folder / QUESTIONS}")
    where = f"{key} of {folder / TRUTH}"
    expected, capabilities = (take(records[key], name, where) for name in ("answer", "capability"))
    if not isinstance(capabilities, list) or not capabilities:
        raise BenchmarkError(f"{where} has the capability {capabilities!r}, but must have a list of names")
    return re.sub(r"\s*<(AND|OR)>\s*", r" <\1> ", str(expected)), sorted({str(name) for name in capabilities})


def judge(folder: Path, questions: list[Question], answers: Answers, by: Judge) -> Scored:
    truth = check(folder, questions)
    prompts = [
        None if text is None else FORM.format(question=question.prompt, expected=expected, given=text)
        for question, text, (expected, _) in zip(questions, answers, truth, strict=True)
    ]
    shares = by.opinions(prompts, TASK, read_share, REMINDER)
    items = [
        {"id": question.id, "given": text, "read": read, "expected": expected, "capabilities": capabilities, "right": read or 0.0}
        for question, text, read, (expected, capabilities) in zip(questions, answers, shares, truth, strict=True)
    ]
    groups = [["total", *(f"capability/{name}" for name in names), f"combination/{'+'.join(names)}"] for _, names in truth]
    return mean_by_group(items, groups, [question.unit for question in questions])


def upload(folder: Path, questions: list[Question], answers: Answers, out: Path) -> list[Path]:
    """Write `mm-vet.json`, one object of v1_<id> -> answer; "" for a question without one."""
    return write_json(out / "mm-vet.json", {f"v1_{question.id}": text or "" for question, text in zip(questions, answers, strict=True)})


BENCHMARK = Benchmark(
    name="mm-vet",
    title="MM-Vet",
    folder="mm-vet",
    files={QUESTIONS: "the questions", TRUTH: "the expected answers, and what each needs"},
    questions=partial(llava_questions, QUESTIONS, "images"),
    upload=upload,
    max_new_tokens=1024,
    judge=judge,
    check=check,
    headline=("total",),
)
