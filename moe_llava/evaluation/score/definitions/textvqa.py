"""TextVQA (Singh et al., arXiv 1904.08920), validation set 0.5.1: questions about text in pictures. As in LLaVA's evaluation, the prompt
includes the text that an OCR system found.

VQA accuracy in percent; EvalAI's normalisation of the answer and of the ten annotators' answers.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path

from moe_llava.evaluation.score.benchmark import Benchmark, Scored
from moe_llava.evaluation.score.means import mean_by
from moe_llava.evaluation.score.normalise import annotators, evalai, vqa_item
from moe_llava.evaluation.score.questions import Answers, Question, llava_questions
from moe_llava.evaluation.score.reading import BenchmarkError, numbered, once, read_object, take, take_list, take_text

QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATIONS = "TextVQA_0.5.1_val.json"


def bare_question(prompt: str) -> str:
    """Return the question without OCR tokens and without the instruction how to answer."""
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found[1] if found else prompt
    lines = prompt.split("\n")
    return lines[1] if lines[0].startswith("Reference OCR token:") and len(lines) > 1 else lines[0]


def score(folder: Path, questions: list[Question], answers: Answers) -> Scored:
    truths, annotated = _truths(folder / ANNOTATIONS)
    items = []
    times: Counter[tuple[str, str]] = Counter()
    for question, text in zip(questions, answers, strict=True):
        # LLaVA's question_id is the image's, so image and question together identify an annotation.
        key = (question.id, bare_question(question.prompt).lower())
        times[key] += 1
        if key not in truths:
            raise BenchmarkError(f"question {key[1]!r} about image {key[0]} of {folder / QUESTIONS} is not in {ANNOTATIONS}")
        if times[key] > annotated[key]:
            raise BenchmarkError(
                f"{folder / QUESTIONS} has the question {key[1]!r} about image {key[0]} more often than {ANNOTATIONS}: {times[key]} times"
            )
        items.append({"id": question.id, "question": key[1], **vqa_item(text, truths[key], evalai)})
    return mean_by(items, (), [question.id for question in questions])


def _truths(file: Path) -> tuple[dict[tuple[str, str], list[str]], Counter[tuple[str, str]]]:
    """Return ((image, question) -> the annotators' normalised answers; the number of records with that key).

    Two records with different ids may have the same question about an image. The last counts, as published.
    """
    truths = {}
    times: Counter[tuple[str, str]] = Counter()
    ids: dict[str, str] = {}
    for where, record in numbered(take_list(read_object(file), "data", str(file)), "data record", file):
        key = (str(take(record, "image_id", where)), take_text(record, "question", where).lower())
        once(ids, "question_id", str(record.get("question_id", key)), where)
        truths[key] = [evalai(answer) for answer in annotators(record, where)]
        times[key] += 1
    return truths, times


BENCHMARK = Benchmark(
    name="textvqa",
    title="TextVQA",
    folder="textvqa",
    files={QUESTIONS: "the questions", ANNOTATIONS: "the annotators' answers"},
    questions=partial(llava_questions, QUESTIONS, "train_images", unique=()),  # `score` counts them
    score=score,
)
