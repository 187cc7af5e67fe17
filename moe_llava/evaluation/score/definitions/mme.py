"""MME (Fu et al., arXiv 2306.13394): two questions about each image, one to be answered with yes, one with no, in fourteen tasks.

Published reading: in the first four characters, in lower case, "yes" means yes, otherwise "no" means no, otherwise it is neither. Lenient
reading: the first word that says yes or no.

A task's score is 100 x acc, the share of right answers, plus 100 x acc_plus, the share of images with both answers right, so at most 200.
Perception and cognition are sums over their tasks.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from moe_llava.evaluation.score.benchmark import LENIENT, Benchmark, Columns, Scored, share
from moe_llava.evaluation.score.metrics import says_yes_leniently
from moe_llava.evaluation.score.questions import SINGLE_WORD, Answers, Question, llava_questions, plain
from moe_llava.evaluation.score.reading import BenchmarkError, once, read_text

QUESTIONS, RELEASE = "llava_mme.jsonl", "MME_Benchmark_release_version"
TASKS = {
    "perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
ALL_TASKS = tuple(task for tasks in TASKS.values() for task in tasks)

read_questions = partial(llava_questions, QUESTIONS, RELEASE, unique=("question_id", "text"))


def read(text: str) -> str:
    """Read an answer as published: yes, no or other."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def read_leniently(text: str) -> str:
    return {True: "yes", False: "no", None: "other"}[says_yes_leniently(text)]


def score(folder: Path, questions: list[Question], answers: Answers) -> Scored:
    truth = {task: _truth(folder / RELEASE / task) for task in ALL_TASKS}
    _check_whole(folder)
    items = []
    for question, text in zip(questions, answers, strict=True):
        task, key = _task(question), (Path(question.id).stem, _bare(question.prompt))
        if key not in truth[task]:
            raise BenchmarkError(f"question {question.id} of {folder / QUESTIONS}, {key[1]!r}, has no answer in {folder / RELEASE / task}")
        found, leniently = (None, None) if text is None else (read(text), read_leniently(text))
        expected = truth[task][key]
        items.append(
            {"id": question.id, "task": task, "question": key[1], "given": text, "read": found, f"read{LENIENT}": leniently}
            | {"expected": expected, "right": found == expected, f"right{LENIENT}": leniently == expected}
        )
    units = [question.id for question in questions]
    columns = {task: np.array([item["task"] == task for item in items], dtype=float) for task in ALL_TASKS}
    # An image with both of its questions counts once for acc_plus, with the first.
    _, first, counts = np.unique(units, return_index=True, return_counts=True)
    columns["first"] = np.zeros(len(units))
    columns["first"][first] = counts == 2
    for suffix in ("", LENIENT):
        right = Counter(item["id"] for item in items if item[f"right{suffix}"])
        columns[f"right{suffix}"] = np.array([item[f"right{suffix}"] for item in items], dtype=float)
        columns[f"both{suffix}"] = np.array([right[unit] == 2 for unit in units], dtype=float)
    return Scored(items, columns, units, _measure, strata=[_task(question) for question in questions])


def _task(question: Question) -> str:
    return question.id.split("/")[0]


def _bare(text: str) -> str:
    """Return a question without the instruction how to answer, which differs between LLaVA's file and the release."""
    return plain(text.removesuffix(SINGLE_WORD)).removesuffix("Please answer yes or no.").strip()


def _check_whole(folder: Path) -> None:
    """Raise BenchmarkError unless the question file has every task, for the totals, and two questions per image, for acc_plus."""
    file, whole = folder / QUESTIONS, read_questions(folder)
    tasks = {_task(question) for question in whole}
    if tasks != set(ALL_TASKS):
        raise BenchmarkError(f"{file} must have the tasks {', '.join(ALL_TASKS)}, but has {', '.join(sorted(tasks)) or 'none'}")
    for image, count in Counter(question.id for question in whole).items():
        if count != 2:
            raise BenchmarkError(f"{image} must have 2 questions in {file}, but has {count}")


def _truth(folder: Path) -> dict[tuple[str, str], str]:
    """Return (image, question) -> yes or no. Some tasks have these files in a folder of their own, beside one of images. Hidden files are
    skipped: macOS writes one beside each file that it copies."""
    own = folder / "questions_answers_YN"
    truth = {}
    seen: dict[tuple[str, str], str] = {}
    for file in sorted(file for file in (own if own.is_dir() else folder).glob("*.txt") if not file.name.startswith(".")):
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            if not line.strip():
                continue
            question, tab, answer = line.strip().rpartition("\t")
            if not tab or answer.lower() not in ("yes", "no"):
                raise BenchmarkError(f"line {number} of {file} must be a question, a tab, and Yes or No, but is {line[:80]!r}")
            once(seen, "question", (file.stem, _bare(question)), f"line {number} of {file}")
            truth[file.stem, _bare(question)] = answer.lower()
    return truth


def _measure(columns: Columns, weights: np.ndarray) -> dict[str, float]:
    """Return points; acc and acc_plus are fractions. A sum over tasks is NaN if a task has no questions."""
    scores: dict[str, float] = {}
    for suffix in ("", LENIENT):
        right, first, both = columns[f"right{suffix}"], columns["first"], columns[f"both{suffix}"]
        parts: dict[str, float] = {}
        for ability, tasks in TASKS.items():
            scores[f"{ability}{suffix}"] = 0.0
            for task in tasks:
                kept = weights * columns[task]
                accuracy, plus = share(float(kept @ right), float(kept.sum())), share(float(kept @ (first * both)), float(kept @ first))
                parts |= {f"{task}{suffix}": accuracy * 100 + plus * 100}
                parts |= {f"{task}/acc{suffix}": accuracy, f"{task}/acc_plus{suffix}": plus}
                scores[f"{ability}{suffix}"] += parts[f"{task}{suffix}"]
        scores |= parts
    return scores


BENCHMARK = Benchmark(
    name="mme",
    title="MME",
    folder="MME",
    files={QUESTIONS: "the questions", **{f"{RELEASE}/{task}": f"answers and images of {task}" for task in ALL_TASKS}},
    questions=read_questions,
    score=score,
    headline=("perception", "cognition"),
    unit="points",
)
