"""From a checkpoint to answers, scores and uploads.

Every benchmark has a folder under `out` (see answers.py), with one inside for each perturbation. A run goes on where the one before was
stopped, with as many processes as it likes: each asks its share of the questions that have no answer yet, and process 0 scores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import transformers
from rich.console import Console

import moe_llava
from moe_llava.checkpoints.load import best_device, load_checkpoint, load_config
from moe_llava.data.records import IMAGE_TOKEN
from moe_llava.evaluation.answers import answer_file, begin, check_settings, given, line, merge
from moe_llava.evaluation.benchmark import Benchmark, BenchmarkError, Question, Scored, find_benchmark, find_folder, result
from moe_llava.evaluation.generate import answer
from moe_llava.evaluation.perturb import Perturbation
from moe_llava.evaluation.progress import show_progress
from moe_llava.evaluation.robustness import plot_robustness, robustness
from moe_llava.evaluation.score import judge_command
from moe_llava.training.saves import write_whole

GREEDY = {"do_sample": False, "num_beams": 1}
MOST_SHOWN = 20
NEVER = timedelta(days=365)


@dataclass(frozen=True)
class Task:
    """`data`: the benchmark's files. `out`: its answers. `questions`: all of them, `asked`: those that this run wants answered."""

    benchmark: Benchmark
    data: Path
    out: Path
    questions: list[Question]
    asked: list[Question]
    settings: dict[str, Any]
    perturbation: Perturbation | None

    def __str__(self) -> str:
        return self.benchmark.name if self.perturbation is None else f"{self.benchmark.name} under {self.perturbation}"


def evaluate(
    checkpoint: str,
    names: Sequence[str],
    data: Path,
    out: Path,
    batch_size: int,
    limit: int | None,
    console: Console,
    perturbations: Sequence[Perturbation] = (),
) -> list[dict[str, Any]]:
    """Returns what each benchmark's result.json holds and, as "robustness", what its robustness.json does; nothing in processes other than
    the first. `limit`: only so many questions of each. `perturbations`: to ask under, one at a time, after the questions as they are.

    Raises CheckpointError or BenchmarkError, with all that is wrong with files and folders, before the model is loaded; later, what is
    wrong with an image, or with a score, once everything has been asked.
    """
    tasks = _plan(checkpoint, names, data, out, limit, perturbations)
    results: list[dict[str, Any]] = []
    problems: list[str] = []
    with _processes() as (process, processes):
        console = console if process == 0 else Console(quiet=True)
        if process == 0:
            for task in tasks:
                begin(task.out, task.settings)
                merge(task.out, task.questions)
        _wait(processes)
        shares = [_share(_left(task), process, processes) for task in tasks]
        if any(shares):
            model, processor = load_checkpoint(checkpoint)
            model.to(best_device())
            tell_of_capacity(model, console)
        for task, share in zip(tasks, shares, strict=True):
            if share:
                _ask(task, share, model, processor, batch_size, process, console)
            _wait(processes)
            if process == 0:
                merge(task.out, task.questions)
                try:
                    found = _finish(task, batch_size, limit, console)
                    results += [found] if found and task.perturbation is None else []
                except BenchmarkError as error:
                    problems.append(str(error))
    if problems:
        raise BenchmarkError("\n  ".join(problems))
    for found in results if perturbations else []:
        found["robustness"] = _compare([task for task in tasks if task.benchmark.name == found["benchmark"]])
    return results


def _plan(
    checkpoint: str, names: Sequence[str], data: Path, out: Path, limit: int | None, perturbations: Sequence[Perturbation]
) -> list[Task]:
    config = load_config(checkpoint)  # raises if there is no checkpoint
    made_with = {"checkpoint": _place(checkpoint), "weights": _weights(checkpoint, config), "dtype": str(config.dtype)}
    tasks, problems = [], []
    for name in dict.fromkeys(names):
        try:
            benchmark = find_benchmark(name)
            if perturbations and benchmark.score is None:
                raise BenchmarkError(f"{benchmark.title} is not scored here, so there is nothing to compare under --perturb")
            folder = find_folder(benchmark, data)
            questions = benchmark.questions(folder)
            check_questions(benchmark.title, questions)
            settings = {**made_with, "benchmark": name, "questions": _digest(questions), **GREEDY}
            settings["max_new_tokens"] = benchmark.max_new_tokens
            tasks.append(Task(benchmark, folder, out / name, questions, questions[:limit], settings, None))
            for perturbation in perturbations:
                inside = out / name / f"{perturbation.name}-{perturbation.strength}"
                changed = {**settings, "perturbation": asdict(perturbation)}
                tasks.append(Task(benchmark, folder, inside, questions, questions[:limit], changed, perturbation))
        except BenchmarkError as error:
            problems.append(str(error))
    for task in tasks:
        try:
            check_settings(task.out, task.settings)
        except BenchmarkError as error:
            problems.append(str(error))
    if problems:
        raise BenchmarkError("\n  ".join(problems))
    return tasks


def check_questions(title: str, questions: Sequence[Question]) -> None:
    """Raises BenchmarkError if there are none, a prompt has other images than its question, or an image file is missing."""
    problems = [] if questions else [f"{title} has no questions"]
    for question in questions:
        found = question.prompt.count(IMAGE_TOKEN)
        if found and found != len(question.images):
            problems.append(f"question {question.id} of {title} has {found} {IMAGE_TOKEN} and {len(question.images)} images")
    images = dict.fromkeys(image for question in questions for image in question.images if isinstance(image, Path))
    problems += [f"{title} asks about the image {image}, which does not exist" for image in images if not image.is_file()]
    if problems:
        more = len(problems) - MOST_SHOWN
        raise BenchmarkError("\n  ".join(problems[:MOST_SHOWN] + ([f"and {more} more"] if more > 0 else [])))


def tell_of_capacity(model: Any, console: Console) -> None:
    """Says so if answers are not those to one question at a time."""
    if getattr(model.config, "capacity_factor", None) is not None:
        console.print("this model's experts have a capacity, which questions asked together share: answers depend on their company")


def _place(checkpoint: str) -> str:
    return str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint


def _weights(checkpoint: str, config: Any) -> str | None:
    """Tells the weights of a folder from later ones, by their time; those of the hub by their revision."""
    times = [file.stat().st_mtime for pattern in ("*.safetensors", "*.bin") for file in Path(checkpoint).glob(pattern)]
    if not times:
        return getattr(config, "_commit_hash", None)
    return datetime.fromtimestamp(max(times), timezone.utc).isoformat()


def _digest(questions: Sequence[Question]) -> str:
    text = json.dumps([[question.id, question.prompt, [Path(str(image)).name for image in question.images]] for question in questions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """(this one, how many) of those that torchrun started. They meet over gloo, and wait for each other as long as it takes."""
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        yield 0, 1
        return
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo", timeout=NEVER)
    yield process, processes
    torch.distributed.destroy_process_group()


def _wait(processes: int) -> None:
    if processes > 1:
        torch.distributed.barrier()


def _left(task: Task) -> list[Question]:
    """Questions without an answer; what two have in common, id and prompt, is asked once."""
    texts = given(task.out, task.asked)
    left = {(question.id, question.prompt): question for question, text in zip(task.asked, texts, strict=True) if text is None}
    return list(left.values())


def _share(left: list[Question], process: int, processes: int) -> list[Question]:
    """What one of several processes asks. Images are dealt out in turn, each with all of its questions, as these are cheaper together;
    questions without one are dealt out singly."""
    numbers: dict[Any, int] = {}
    dealt = [numbers.setdefault(question.images or (question.id, question.prompt), len(numbers)) for question in left]
    return [question for question, number in zip(left, dealt, strict=True) if number % processes == process]


def _ask(task: Task, share: list[Question], model: Any, processor: Any, batch_size: int, process: int, console: Console) -> None:
    """Appends answers as they come, batch by batch."""
    model_id = Path(task.settings["checkpoint"]).name
    with (
        show_progress(f"asking {task}", len(share), console) as advance,
        answer_file(task.out, process).open("a", encoding="utf-8") as file,
    ):
        for batch in answer(model, processor, share, batch_size, task.benchmark.max_new_tokens, task.perturbation):
            file.write("".join(line(share[index], text, model_id) for index, text in batch))
            file.flush()
            advance(len(batch))


def _finish(task: Task, batch_size: int, limit: int | None, console: Console) -> dict[str, Any] | None:
    """Uploads and scores: the result, if the benchmark can be scored here."""
    benchmark, file = task.benchmark, answer_file(task.out)
    uploads = _write_uploads(task, limit, console) if task.perturbation is None else []
    if benchmark.score is None:
        if benchmark.judge is not None:
            command = judge_command(benchmark, task.data, file)
            console.print(f"{benchmark.title}: a language model has to judge the answers:\n{command}", highlight=False, soft_wrap=True)
        return None
    found = result(benchmark, _scored(task), task.asked, given(task.out, task.asked))
    found |= {
        "model": task.settings["checkpoint"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "generation": {**GREEDY, "max_new_tokens": benchmark.max_new_tokens, "dtype": task.settings["dtype"], "batch_size": batch_size},
        "versions": {module.__name__: module.__version__ for module in (moe_llava, torch, transformers)},
        "uploads": [upload.name for upload in uploads],
    }
    if task.perturbation is not None:
        found["perturbation"] = asdict(task.perturbation)
    write_whole(task.out / "result.json", json.dumps(found, indent=1) + "\n")
    return found


def _write_uploads(task: Task, limit: int | None, console: Console) -> list[Path]:
    """What the benchmark's server takes, if it has one, and all questions were asked."""
    benchmark = task.benchmark
    if benchmark.upload is None:
        return []
    if limit is not None:
        console.print(f"{benchmark.title}: no upload of answers to {len(task.asked)} questions only", highlight=False)
        return []
    uploads = benchmark.upload(task.data, task.asked, given(task.out, task.asked), task.out)
    for upload in uploads:
        console.print(f"{benchmark.title}: {upload} is what its server takes", highlight=False, soft_wrap=True)
    return uploads


def _scored(task: Task) -> Scored:
    assert task.benchmark.score is not None
    return task.benchmark.score(task.data, task.asked, given(task.out, task.asked))


def _compare(tasks: Sequence[Task]) -> dict[str, Any]:
    """Writes robustness.json and robustness.png beside the answers to the questions as they are, and returns the first.

    `tasks`: those of one benchmark, the one without perturbation first.
    """
    clean, *perturbed = (_scored(task) for task in tasks)
    under = {task.perturbation: scored.items for task, scored in zip(tasks[1:], perturbed, strict=True) if task.perturbation is not None}
    model = tasks[0].settings["checkpoint"]
    summary = {"benchmark": tasks[0].benchmark.name, "model": model, **robustness(clean.items, under, clean.units)}
    write_whole(tasks[0].out / "robustness.json", json.dumps(summary, indent=1) + "\n")
    figure = plot_robustness(summary, f"{Path(model).name}, {tasks[0].benchmark.title}")
    figure.savefig(tasks[0].out / "robustness.png", dpi=110)
    plt.close(figure)
    return summary
