"""VQAv2 (Goyal et al., arXiv 1612.00837): open questions about COCO pictures.

The test set's answers are a server's secret: what it takes is written for test-dev's questions, over the list of all test questions. The
validation set is scored here: VQA accuracy in percent, as the published script; the annotators' answers lose their punctuation where they
are not all the same, and are otherwise taken as they are.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_llava.evaluation.score.benchmark import (
    Benchmark,
    BenchmarkError,
    Question,
    Scored,
    find_file,
    llava_questions,
    read_json_lines,
    take,
    take_list,
)
from moe_llava.evaluation.score.means import mean_by
from moe_llava.evaluation.score.normalise import annotators, evalai, leave_one_out, strip_punctuation, vqa
from moe_llava.evaluation.score.reading import once, read_object

VALIDATION = "llava_vqav2_mscoco_val2014.jsonl"
TEST_DEV = "llava_vqav2_mscoco_test-dev2015.jsonl"
TEST = "llava_vqav2_mscoco_test2015.jsonl"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
KINDS = ("answer_type", "question_type")
QUESTIONS = f"{VALIDATION} | {TEST_DEV}"


def questions(folder: Path) -> list[Question]:
    """The validation set's, if they are there, or else test-dev's."""
    file = find_file(folder, QUESTIONS)
    return llava_questions(file, folder / ("val2014" if file.name == VALIDATION else "test2015"))


def score(folder: Path, asked: list[Question], given: list[str | None]) -> Scored:
    annotations = _annotations(folder / ANNOTATIONS)
    items: list[dict[str, Any]] = []
    for question, text in zip(asked, given, strict=True):
        if question.id not in annotations:
            raise BenchmarkError(f"question {question.id} of {folder / VALIDATION} is not in {ANNOTATIONS}")
        record = annotations[question.id]
        where = f"the annotation of question {question.id} in {folder / ANNOTATIONS}"
        truths = _truths(record, where)
        read = None if text is None else vqa(text)
        right = 0.0 if read is None else leave_one_out(read, truths)
        kinds = {kind: str(take(record, kind, where)) for kind in KINDS}
        items.append({"id": question.id, "given": text, "read": read, "expected": truths, "right": right, **kinds})
    return mean_by(items, KINDS, [_image(question) for question in asked])


def upload(folder: Path, asked: list[Question], given: list[str | None], out: Path) -> list[Path]:
    """`vqav2.json`: the answers by EvalAI's normalisation, as LLaVA sends them; "" for a question of the test set without one."""
    answers = {question.id: text for question, text in zip(asked, given, strict=True)}
    ids = check_test(folder, asked)
    file = out / "vqav2.json"
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([{"question_id": identity, "answer": evalai(answers.get(str(identity)) or "")} for identity in ids]))
    return [file]


def check_test(folder: Path, asked: list[Question]) -> list[Any]:
    """Return the ids of all test questions. Raise BenchmarkError if what is asked is not among them."""
    ids = []
    seen: dict[str, str] = {}
    for number, record in enumerate(read_json_lines(folder / TEST), start=1):
        where = f"record {number} of {folder / TEST}"
        ids.append(take(record, "question_id", where))
        once(seen, "question_id", str(ids[-1]), where)
    strange = sorted({question.id for question in asked} - seen.keys())
    if strange:
        raise BenchmarkError(
            f"question {strange[0]} and {len(strange) - 1} more are not of the test set in {folder / TEST}, which alone is uploaded"
        )
    return ids


def _annotations(file: Path) -> dict[str, dict[str, Any]]:
    annotations = {}
    seen: dict[str, str] = {}
    for number, record in enumerate(take_list(read_object(file), "annotations", str(file)), start=1):
        where = f"annotation {number} of {file}"
        identity = str(take(record, "question_id", where))
        once(seen, "question_id", identity, where)
        annotations[identity] = record
    return annotations


def _truths(record: dict[str, Any], where: str) -> list[str]:
    answers = annotators(record, where)
    return answers if len(set(answers)) == 1 else [strip_punctuation(answer) for answer in answers]


def _image(question: Question) -> str:
    return str(question.images[0]) if question.images else question.id


def split(benchmark: Benchmark, folder: Path) -> Benchmark:
    if find_file(folder, QUESTIONS).name == VALIDATION:
        return replace(benchmark, upload=None, files=benchmark.files | {ANNOTATIONS: "the annotators' answers"})
    whole = {TEST: "the list of all test questions, which an upload must cover"}
    return replace(benchmark, title="VQAv2's test-dev", score=None, check=check_test, files=benchmark.files | whole)


BENCHMARK = Benchmark(
    name="vqav2",
    title="VQAv2",
    folder="vqav2",
    files={
        QUESTIONS: f"the questions, of the validation set (scored here with {ANNOTATIONS}, and taken if both are there) "
        f"or of test-dev (by upload, which needs {TEST})"
    },
    questions=questions,
    score=score,
    headline=("accuracy",),
    upload=upload,
    split=split,
)
