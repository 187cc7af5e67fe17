"""The plan of an evaluation: its questions, and where the answers go. Everything wrong with names, files and folders is reported here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_llava.checkpoints.load import load_config
from moe_llava.common.images import missing_image
from moe_llava.common.messages import listed
from moe_llava.common.videos import missing_video
from moe_llava.data.records import IMAGE_TOKEN, PART_TYPES, VIDEO_TOKEN
from moe_llava.evaluation.ask.answers import check_settings
from moe_llava.evaluation.ask.contents import checkpoint_digests, picture_digests, picture_name
from moe_llava.evaluation.score.benchmark import (
    NO_OPTIONS,
    Benchmark,
    Options,
    check_truth,
    configured,
    find_benchmark,
    find_folder,
    split_in,
)
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.stress.perturb import Perturbation

GREEDY = {"do_sample": False, "num_beams": 1}


@dataclass(frozen=True)
class Task:
    """A benchmark, as it is or under a perturbation. `data` holds its files, `out` its answers. `selected` are the questions that this run
    evaluates."""

    benchmark: Benchmark
    data: Path
    out: Path
    questions: list[Question]
    selected: list[Question]
    settings: dict[str, Any]
    perturbation: Perturbation | None = None

    def __str__(self) -> str:
        return self.benchmark.name if self.perturbation is None else f"{self.benchmark.name} under {self.perturbation}"

    def under(self, perturbation: Perturbation) -> Task:
        """Return the task under a perturbation, with a folder inside this one's."""
        out, settings = self.out / f"{perturbation.name}-{perturbation.strength}", {**self.settings, "perturbation": asdict(perturbation)}
        return replace(self, out=out, settings=settings, perturbation=perturbation)


def plan_tasks(
    checkpoint: str,
    names: Sequence[str],
    data: Path,
    out: Path,
    limit: int | None,
    perturbations: Sequence[Perturbation],
    options: Options = NO_OPTIONS,
    dtype: str = "auto",
) -> list[list[Task]]:
    """Return for each benchmark its task without perturbation, and one under each.

    Raises CheckpointError if there is no checkpoint, BenchmarkError with everything wrong with benchmarks, ground truth and folders.
    """
    if out.exists() and not out.is_dir():
        raise BenchmarkError(f"{out} is a file, but --out must be a folder")
    kept = str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint
    loaded = str(load_config(checkpoint).dtype) if dtype == "auto" else f"torch.{dtype}"
    made_with = {"checkpoint": kept, "checkpoint_files": checkpoint_digests(checkpoint), "dtype": loaded}
    plans, problems = [], []
    for name in dict.fromkeys(names):
        try:
            benchmark = configured(find_benchmark(name), options)
            _check_scored(benchmark, perturbations)
            benchmark, folder, questions = prepare(benchmark, data, limit)
            _check_scored(benchmark, perturbations)
            settings = {**made_with, "benchmark": name, "questions": _digests(questions, folder), **GREEDY}
            settings["max_new_tokens"] = benchmark.max_new_tokens
            settings["pictures"] = picture_digests(questions[:limit], folder)
            task = Task(benchmark, folder, out / name, questions, questions[:limit], settings)
            plans.append([task, *(task.under(perturbation) for perturbation in perturbations)])
        except BenchmarkError as error:
            problems.append(str(error))
    for task in (task for plan in plans for task in plan):
        try:
            check_settings(task.out, task.settings)
        except BenchmarkError as error:
            problems.append(str(error))
    if problems:
        raise BenchmarkError("\n  ".join(problems))
    return plans


def prepare(benchmark: Benchmark, data: Path, limit: int | None = None) -> tuple[Benchmark, Path, list[Question]]:
    """Return the benchmark for the split in its folder, the folder, and all questions. `limit`: how many will be evaluated; None: all.

    Raises BenchmarkError for everything wrong with questions, pictures and the needed ground truth.
    """
    folder = find_folder(benchmark, data)
    benchmark = split_in(benchmark, folder)
    questions = benchmark.questions(folder)
    check_questions(benchmark.title, questions)
    check_truth(benchmark, folder, questions[:limit])
    return benchmark, folder, questions


def _check_scored(benchmark: Benchmark, perturbations: Sequence[Perturbation]) -> None:
    if perturbations and benchmark.score is None:
        raise BenchmarkError(f"{benchmark.title} is not scored here, so there is nothing to compare under --perturb")


def check_questions(title: str, questions: Sequence[Question]) -> None:
    """Raise BenchmarkError if there are none, if a prompt and its question differ in the number of images or videos, or if a file is
    missing."""
    problems = [] if questions else [f"{title} has no questions"]
    files: dict[Path, Question] = {}  # with the first question about each
    for question in questions:
        token, number = (VIDEO_TOKEN, 1) if question.video is not None else (IMAGE_TOKEN, len(question.images))
        found = sum(text.count(token) for text in question.texts)
        if found and found != number:
            problems.append(f"question {question.id} of {title} has {found} {token} and {number} {PART_TYPES[token]}s")
        for medium in question.media:
            if isinstance(medium, Path):
                files.setdefault(medium, question)
    for file, question in files.items():
        if not file.is_file():
            missing = missing_video if file == question.video else missing_image
            problems.append(str(missing(f"question {question.id} of {title}", file)))
    if problems:
        raise BenchmarkError(listed(problems))


def _digests(questions: Sequence[Question], folder: Path) -> dict[str, str]:
    """Return the digests of what all questions are; `picture_digests` has the contents of the selected ones' pictures."""
    return {
        "texts": _digest([[each.id, each.prompt, each.history, each.system, each.options] for each in questions]),
        "names of pictures": _digest([[picture_name(picture, folder) for picture in each.media] for each in questions]),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
