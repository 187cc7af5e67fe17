"""SEED-Bench (Li et al., arXiv 2307.16125): questions with four options, of twelve types, about images, and about a frame from the middle
of videos.

Published reading, as in LLaVA: the answer is the letter and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

from moe_llava.evaluation.benchmark import Benchmark, BenchmarkError, Question, Scored, llava_questions, take
from moe_llava.evaluation.choices import judged, options_in, scored

QUESTIONS = "llava-seed-bench.jsonl"
KINDS = {"SEED-Bench-image": "image", "SEED-Bench-video-image": "video"}


def questions(folder: Path) -> list[Question]:
    return llava_questions(folder / QUESTIONS, folder)


def score(folder: Path, asked: list[Question], given: list[str | None]) -> Scored:
    file = folder / QUESTIONS
    items, groups = [], []
    for question, text in zip(asked, given, strict=True):
        where = f"question {question.id} of {file}"
        options = options_in(question.prompt)
        read = text if text in options else None
        items.append(judged(question, text, read, options, take(question.extra, "answer", where), file))
        groups.append(["total", _kind(question, where), f"type/{take(question.extra, 'category', where)}"])
    return scored(items, groups, [str(question.images[0]) for question in asked])


def _kind(question: Question, where: str) -> str:
    """Whether it is about an image or a video: as a folder above its image says."""
    image = str(question.images[0]) if question.images else ""
    kinds = [KINDS[part] for part in Path(image).parts if part in KINDS]
    if not kinds:
        raise BenchmarkError(f"{where} has the image {image!r}, but must have one in {' or '.join(KINDS)}")
    return kinds[-1]


def upload(folder: Path, asked: list[Question], given: list[str | None], out: Path) -> list[Path]:
    """JSON lines of question_id and prediction, which is empty where there is no answer."""
    file = out / "seed_bench.jsonl"
    lines = [json.dumps({"question_id": question.id, "prediction": text or ""}) for question, text in zip(asked, given, strict=True)]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [file]


BENCHMARK = Benchmark(
    name="seed-bench",
    title="SEED-Bench",
    folder="seed_bench",
    files={QUESTIONS: "questions and answers"},
    questions=questions,
    score=score,
    headline=("total",),
    upload=upload,
)
