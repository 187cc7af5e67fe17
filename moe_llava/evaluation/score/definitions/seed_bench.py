"""SEED-Bench (Li et al., arXiv 2307.16125): questions with four options, of twelve types, about images and about a frame from the middle of
videos.

Published reading, as in LLaVA: the answer is the letter and nothing else. The expected letters are in SEED-Bench.json, which LLaVA's script
reads, or in the questions file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from moe_llava.evaluation.score.benchmark import Benchmark, Scored
from moe_llava.evaluation.score.choices import judged, options_in
from moe_llava.evaluation.score.means import mean_by_group
from moe_llava.evaluation.score.questions import Answers, Question, llava_questions
from moe_llava.evaluation.score.reading import BenchmarkError, numbered, read_object, take, take_list, take_text

QUESTIONS = "llava-seed-bench.jsonl"
ANSWERS = "SEED-Bench.json"
KINDS = {"SEED-Bench-image": "image", "SEED-Bench-video-image": "video"}


def read(text: str, options: Mapping[str, str]) -> str | None:
    """Read a letter as published."""
    return text if text in options else None


def score(folder: Path, questions: list[Question], answers: Answers) -> Scored:
    file = folder / QUESTIONS
    letters = _letters(folder / ANSWERS) if (folder / ANSWERS).is_file() else {}
    items, groups = [], []
    for question, text in zip(questions, answers, strict=True):
        where = f"question {question.id} of {file}"
        expected = _expected(question, letters, where)
        items.append(judged(question, text, read, options_in(question.prompt), expected, file))
        groups.append(["total", _kind(question, where), f"type/{take(question.extra, 'category', where)}"])
    return mean_by_group(items, groups, [question.unit for question in questions])


def _letters(file: Path) -> dict[str, str]:
    """Return id of a question -> the letter of its answer."""
    records = numbered(take_list(read_object(file), "questions", str(file)), "question record", file, "question_id")
    return {str(record["question_id"]): take_text(record, "answer", where) for where, record in records}


def _expected(question: Question, letters: dict[str, str], where: str) -> str:
    found = letters.get(question.id)
    if question.extra.get("answer") is None:
        if found is None:
            raise BenchmarkError(f"{where} has no 'answer', and {ANSWERS} has none for it either")
        return found
    own = take_text(question.extra, "answer", where)
    if found not in (None, own):
        raise BenchmarkError(f"{where} has the answer {own!r}, but {ANSWERS} has {found!r}")
    return own


def _kind(question: Question, where: str) -> str:
    """Return image or video, by the folder of the question's image."""
    image = str(question.images[0]) if question.images else ""
    kinds = [KINDS[part] for part in Path(image).parts if part in KINDS]
    if not kinds:
        raise BenchmarkError(f"{where} has the image {image!r}, but must have one in {' or '.join(KINDS)}")
    return kinds[-1]


def upload(folder: Path, questions: list[Question], answers: Answers, out: Path) -> list[Path]:
    """Write JSON lines of question_id and prediction; "" for a question without an answer."""
    file = out / "seed_bench.jsonl"
    pairs = zip(questions, answers, strict=True)
    lines = [json.dumps({"question_id": question.id, "prediction": text or ""}) for question, text in pairs]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [file]


def split(benchmark: Benchmark, folder: Path) -> Benchmark:
    if all(question.extra.get("answer") is not None for question in benchmark.questions(folder)):
        return benchmark
    return replace(benchmark, files=benchmark.files | {ANSWERS: f"the answers, which not all questions of {QUESTIONS} have"})


BENCHMARK = Benchmark(
    name="seed-bench",
    title="SEED-Bench",
    folder="seed_bench",
    files={QUESTIONS: f"the questions; where they have no answer, {ANSWERS} is needed, too"},
    questions=partial(llava_questions, QUESTIONS, "."),
    score=score,
    headline=("total",),
    upload=upload,
    split=split,
)
