"""VizWiz-VQA (Gurari et al., arXiv 1802.08218): questions that blind people asked about photos of theirs; many cannot be answered.

The test set's answers are a server's secret. The validation set is scored here: VQA accuracy in percent, as the published script, which
takes the annotators' answers as they are. How well a model knows what cannot be answered: precision, recall and F1, in percent, of the
answer "unanswerable" for the questions that are marked so. (The challenge asks for a confidence instead of an answer, and adds the average
precision.)
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_llava.evaluation.score.benchmark import (
    SINGLE_WORD,
    Benchmark,
    Columns,
    Question,
    Scored,
    find_file,
    first_image,
    llava_questions,
    take,
    take_text,
)
from moe_llava.evaluation.score.means import detection, mean_by
from moe_llava.evaluation.score.normalise import annotators, evalai, leave_one_out, vqa
from moe_llava.evaluation.score.reading import once, read_list

TEST = "llava_test.jsonl"
VALIDATION = "val.json"
QUESTIONS = f"{VALIDATION} | {TEST}"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def questions(folder: Path) -> list[Question]:
    """The validation set's, if they are there, or else the test set's."""
    file = find_file(folder, QUESTIONS)
    if file.name == TEST:
        return llava_questions(file, folder / "test")
    return [
        Question(image, take_text(record, "question", f"{image} of {file}") + UNANSWERABLE + SINGLE_WORD, (folder / "val" / image,))
        for image, record in _records(file).items()
    ]


def score(folder: Path, asked: list[Question], given: list[str | None]) -> Scored:
    records = _records(folder / VALIDATION)
    items = []
    for question, text in zip(asked, given, strict=True):
        items.append({"id": question.id} | _item(records[question.id], text, f"{question.id} of {folder / VALIDATION}"))
    scored = mean_by(items, ("answer_type",), [item["id"] for item in items])
    marks = {name: np.array([item[name] for item in items], dtype=bool) for name in ("unanswerable", "refused")}

    def measure(columns: Columns, weights: np.ndarray) -> dict[str, float]:
        return scored.measure(columns, weights) | _refusals(columns, weights)

    return replace(scored, columns={**scored.columns, **marks}, measure=measure)


def _item(record: dict[str, Any], text: str | None, where: str) -> dict[str, Any]:
    truths = annotators(record, where)
    read = None if text is None else vqa(text)
    unanswerable = not take(record, "answerable", where)
    return {
        "given": text,
        "read": read,
        "expected": truths,
        "right": 0.0 if read is None else leave_one_out(read, truths),
        "answer_type": str(take(record, "answer_type", where)),
        "unanswerable": unanswerable,
        # A missing answer counts as the wrong one.
        "refused": not unanswerable if read is None else read == "unanswerable",
    }


def _refusals(columns: Columns, weights: np.ndarray) -> dict[str, float]:
    precision, recall, f1 = detection(weights, columns["refused"], columns["unanswerable"])
    return {"unanswerable/precision": 100 * precision, "unanswerable/recall": 100 * recall, "unanswerable/f1": 100 * f1}


def upload(folder: Path, asked: list[Question], given: list[str | None], out: Path) -> list[Path]:
    """`vizwiz.json`: the answers by EvalAI's normalisation, as LLaVA sends them; "" for a question without one."""
    file = out / "vizwiz.json"
    out.mkdir(parents=True, exist_ok=True)
    answers = zip(asked, given, strict=True)
    file.write_text(json.dumps([{"image": _image(question), "answer": evalai(text or "")} for question, text in answers]))
    return [file]


def _records(file: Path) -> dict[str, dict[str, Any]]:
    """Image name -> its record: there is one question about each."""
    records = {}
    seen: dict[str, str] = {}
    for number, record in enumerate(read_list(file), start=1):
        where = f"record {number} of {file}"
        image = take_text(record, "image", where)
        once(seen, "image", image, where)
        records[image] = record
    return records


def _image(question: Question) -> str:
    return Path(str(first_image(question, f"question {question.id} of VizWiz, whose answers are known by their images,"))).name


def check_images(folder: Path, asked: list[Question]) -> None:
    """The server knows answers by their images."""
    seen: dict[str, str] = {}
    for question in asked:
        once(seen, "image", _image(question), f"question {question.id} of {folder / TEST}")


def split(benchmark: Benchmark, folder: Path) -> Benchmark:
    if find_file(folder, QUESTIONS).name == VALIDATION:
        return replace(benchmark, upload=None)
    return replace(benchmark, title="VizWiz's test set", score=None, check=check_images)


BENCHMARK = Benchmark(
    name="vizwiz",
    title="VizWiz",
    folder="vizwiz",
    files={QUESTIONS: "the questions, of the validation set (scored here, and taken if both are there) or of the test set (by upload)"},
    questions=questions,
    score=score,
    headline=("accuracy",),
    upload=upload,
    split=split,
)
