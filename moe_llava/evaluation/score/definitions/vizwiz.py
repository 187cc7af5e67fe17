"""VizWiz-VQA (Gurari et al., arXiv 1802.08218): questions that blind people asked about their photos; many cannot be answered.

The test set's answers are secret. The validation set is scored here: VQA accuracy in percent, as by the published script, which does not
normalise the annotators' answers; and how well a model detects questions that cannot be answered: precision, recall and F1, in percent, of
the answer "unanswerable". (The challenge asks for a confidence instead of an answer, and adds the average precision.)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_llava.evaluation.score.benchmark import Benchmark, Columns, Scored, find_file, upload_each
from moe_llava.evaluation.score.means import mean_by, yes_or_no
from moe_llava.evaluation.score.normalise import annotators, evalai, vqa, vqa_item
from moe_llava.evaluation.score.questions import SINGLE_WORD, Answers, Question, image_name, llava_questions
from moe_llava.evaluation.score.reading import numbered, once, read_list, take, take_text

TEST = "llava_test.jsonl"
VALIDATION = "val.json"
QUESTIONS = f"{VALIDATION} | {TEST}"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def questions(folder: Path) -> list[Question]:
    """Read the questions of the validation set if they are there, or else the test set's."""
    file = find_file(folder, QUESTIONS)
    if file.name == TEST:
        return llava_questions(TEST, "test", folder)
    return [
        Question(image, take_text(record, "question", f"{image} of {file}") + UNANSWERABLE + SINGLE_WORD, (folder / "val" / image,))
        for image, record in _records(file).items()
    ]


def _records(file: Path) -> dict[str, dict[str, Any]]:
    """Return image name -> its record: there is one question about each image."""
    return {take_text(record, "image", where): record for where, record in numbered(read_list(file), "record", file, "image")}


def score(folder: Path, questions: list[Question], answers: Answers) -> Scored:
    records = _records(folder / VALIDATION)
    items = []
    for question, text in zip(questions, answers, strict=True):
        items.append({"id": question.id} | _item(records[question.id], text, f"{question.id} of {folder / VALIDATION}"))
    scored = mean_by(items, ("answer_type",), [item["id"] for item in items])
    marks = {name: np.array([item[name] for item in items], dtype=bool) for name in ("unanswerable", "refused")}

    def measure(columns: Columns, weights: np.ndarray) -> dict[str, float]:
        found = yes_or_no(weights, columns["refused"], columns["unanswerable"])
        return scored.measure(columns, weights) | {f"unanswerable/{name}": 100 * found[name] for name in ("precision", "recall", "f1")}

    return replace(scored, columns={**scored.columns, **marks}, measure=measure)


def _item(record: dict[str, Any], text: str | None, where: str) -> dict[str, Any]:
    item = vqa_item(text, annotators(record, where), vqa)
    unanswerable = not take(record, "answerable", where)
    # A missing answer counts as the wrong one.
    refused = not unanswerable if text is None else item["read"] == "unanswerable"
    return item | {"answer_type": str(take(record, "answer_type", where)), "unanswerable": unanswerable, "refused": refused}


def _image(question: Question) -> str:
    return image_name(question, f"question {question.id} of VizWiz, whose answers are identified by their images,")


def check_images(folder: Path, questions: list[Question]) -> None:
    """Raise BenchmarkError if two questions have one image: the server identifies answers by their images."""
    seen: dict[str, str] = {}
    for question in questions:
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
    # As LLaVA writes it.
    upload=upload_each("vizwiz.json", lambda question, text: {"image": _image(question), "answer": evalai(text)}),
    split=split,
)
