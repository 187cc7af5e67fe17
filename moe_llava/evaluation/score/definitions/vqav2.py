"""VQAv2 (Goyal et al., arXiv 1612.00837): open questions about COCO pictures.

The test set's answers are secret: an upload has answers to test-dev's questions, in the list of all test questions. The validation set is
scored here: VQA accuracy in percent, as by the published script. The annotators' answers lose their punctuation if they differ, and are
otherwise compared as they are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_llava.evaluation.score.benchmark import Benchmark, Scored, find_file, write_json
from moe_llava.evaluation.score.means import mean_by
from moe_llava.evaluation.score.normalise import annotators, evalai, strip_punctuation, vqa, vqa_item
from moe_llava.evaluation.score.questions import Answers, Question, llava_questions
from moe_llava.evaluation.score.reading import BenchmarkError, numbered, read_json_lines, read_object, take, take_list

VALIDATION = "llava_vqav2_mscoco_val2014.jsonl"
TEST_DEV = "llava_vqav2_mscoco_test-dev2015.jsonl"
TEST = "llava_vqav2_mscoco_test2015.jsonl"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
KINDS = ("answer_type", "question_type")
QUESTIONS = f"{VALIDATION} | {TEST_DEV}"


def questions(folder: Path) -> list[Question]:
    """Read the questions of the validation set if they are there, or else test-dev's."""
    file = find_file(folder, QUESTIONS)
    return llava_questions(file.name, "val2014" if file.name == VALIDATION else "test2015", folder)


def score(folder: Path, questions: list[Question], answers: Answers) -> Scored:
    file = folder / ANNOTATIONS
    records = numbered(take_list(read_object(file), "annotations", str(file)), "annotation", file, "question_id")
    annotations = {str(record["question_id"]): record for _, record in records}
    items: list[dict[str, Any]] = []
    for question, text in zip(questions, answers, strict=True):
        if question.id not in annotations:
            raise BenchmarkError(f"question {question.id} of {folder / VALIDATION} is not in {ANNOTATIONS}")
        record, where = annotations[question.id], f"the annotation of question {question.id} in {file}"
        truths = annotators(record, where)
        if len(set(truths)) > 1:
            truths = [strip_punctuation(truth) for truth in truths]
        kinds = {kind: str(take(record, kind, where)) for kind in KINDS}
        items.append({"id": question.id, **vqa_item(text, truths, vqa), **kinds})
    return mean_by(items, KINDS, [question.unit for question in questions])


def upload(folder: Path, questions: list[Question], answers: Answers, out: Path) -> list[Path]:
    """Write `vqav2.json` as LLaVA does: the answers in EvalAI's normalisation; "" for a question of the test set without an answer."""
    texts = {question.id: text for question, text in zip(questions, answers, strict=True)}
    ids = check_test(folder, questions)
    return write_json(out / "vqav2.json", [{"question_id": each, "answer": evalai(texts.get(str(each)) or "")} for each in ids])


def check_test(folder: Path, questions: list[Question]) -> list[Any]:
    """Return the ids of all test questions. Raises BenchmarkError if a question is not among them."""
    ids = [record["question_id"] for _, record in numbered(read_json_lines(folder / TEST), "record", folder / TEST, "question_id")]
    strange = sorted({question.id for question in questions} - set(map(str, ids)))
    if strange:
        raise BenchmarkError(f"{folder / TEST} lacks {len(strange)} questions, such as {strange[0]}: only test questions can be uploaded")
    return ids


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
    upload=upload,
    split=split,
)
