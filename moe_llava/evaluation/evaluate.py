"""From a checkpoint to answers, scores and uploads.

Each benchmark has a folder under `out` (see answers.py), with one inside for each perturbation. A run resumes where the last one was
stopped, with any number of processes: each evaluates its share of the questions without an answer, and process 0 scores.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import transformers
from rich.console import Console

import moe_llava
from moe_llava.checkpoints.offload import load_for_inference
from moe_llava.common.files import write_whole
from moe_llava.common.progress import show_progress
from moe_llava.evaluation.ask.answers import SETTINGS, answer_file, begin, check_settings, line, merge, read_answers, writing
from moe_llava.evaluation.ask.generate import answer
from moe_llava.evaluation.ask.tasks import GREEDY, Task, plan_tasks
from moe_llava.evaluation.score.benchmark import NO_OPTIONS, Options, Scored, result
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError
from moe_llava.evaluation.score.scoring import judge_command
from moe_llava.evaluation.stress.perturb import KINDS, PIXEL_ATTACKS, STRENGTHS, Perturbation
from moe_llava.evaluation.stress.robustness import plot_robustness, robustness

NEVER = timedelta(days=365)


def evaluate(
    checkpoint: str,
    names: Sequence[str],
    data: Path,
    out: Path,
    batch_size: int,
    limit: int | None,
    console: Console,
    perturbations: Sequence[Perturbation] = (),
    keep_experts: float | None = None,
    options: Options = NO_OPTIONS,
    dtype: str = "auto",
) -> Iterator[dict[str, Any]]:
    """Yield for each benchmark the content of its result.json and, as "robustness", that of its robustness.json; nothing in processes other
    than the first.

    Args:
        limit: evaluate only so many questions of each benchmark.
        perturbations: repeat the evaluation under each of them, after the one without.
        keep_experts: the share of the experts to keep in memory; None: all.
        options: of the benchmark `questions`.
        dtype: to load the weights in; auto: as they are stored.

    Raises CheckpointError or BenchmarkError, with everything wrong with files and folders, before the model is loaded; later for an image
    or a score, after everything has been evaluated.
    """
    attacks = sorted({perturbation.name for perturbation in perturbations} & set(PIXEL_ATTACKS))
    if attacks and keep_experts is not None:
        raise BenchmarkError(f"{' and '.join(attacks)} need the model's gradient, and so all experts in memory: leave out --keep-experts")
    plans = plan_tasks(checkpoint, names, data, out, limit, perturbations, options, dtype)
    problems: list[str] = []
    with _processes() as (process, processes), contextlib.ExitStack() as stack:
        console = console if process == 0 else Console(quiet=True)
        if process == 0:
            for plan in plans:
                stack.enter_context(writing(plan[0].out))
                for task in plan:
                    begin(task.out, task.settings)
                    merge(task.out, task.questions)
        _wait(processes)
        shares = {str(task): _share(_unanswered(task), process, processes) for plan in plans for task in plan}
        _wait(processes)  # a share depends on the answers there, to which the next lines add
        if any(shares.values()):
            model, processor, _ = load_for_inference(checkpoint, dtype, keep_experts)
            warn_of_capacity(model, console)
        for plan in plans:
            for task in plan:
                if shares[str(task)]:
                    _write_answers(task, shares[str(task)], model, processor, batch_size, process, console)
                _wait(processes)
                if process == 0:
                    merge(task.out, task.questions)
            if process == 0:
                try:
                    yield from _finish(plan, batch_size, limit, console)
                except BenchmarkError as error:
                    problems.append(str(error))
    if problems:
        raise BenchmarkError("\n  ".join(problems))


def warn_of_capacity(model: Any, console: Console) -> None:
    """Print a warning if answers depend on the other questions of a batch."""
    if getattr(model.config, "capacity_factor", None) is not None:
        console.print("this model's experts have a capacity, which the questions of a batch share: answers depend on the batch")


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """Yield (rank, number) of the processes that torchrun started. They meet over gloo, and wait for each other without a time limit."""
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


def _unanswered(task: Task) -> list[Question]:
    """Return the questions without an answer; questions with the same id and prompt are evaluated once."""
    pairs = zip(task.selected, read_answers(task.out, task.selected), strict=True)
    return list({(question.id, question.prompt): question for question, text in pairs if text is None}.values())


def _share(left: list[Question], process: int, processes: int) -> list[Question]:
    """Return the questions for one of several processes. Images are dealt out in turn, each with all of its questions, which is cheaper;
    questions without an image are dealt out singly."""
    numbers: dict[Any, int] = {}
    dealt = [numbers.setdefault(question.images or (question.id, question.prompt), len(numbers)) for question in left]
    return [question for question, number in zip(left, dealt, strict=True) if number % processes == process]


def _write_answers(task: Task, share: list[Question], model: Any, processor: Any, batch_size: int, process: int, console: Console) -> None:
    """Append answers batch by batch."""
    model_id = Path(task.settings["checkpoint"]).name
    with (
        show_progress(f"evaluating {task}", len(share), console) as advance,
        answer_file(task.out, process).open("a", encoding="utf-8") as file,
    ):
        for batch in answer(model, processor, share, batch_size, task.benchmark.max_new_tokens, task.perturbation):
            file.write("".join(line(share[index], text, model_id, task.perturbation) for index, text in batch))
            file.flush()
            advance(len(batch))


def _finish(plan: list[Task], batch_size: int, limit: int | None, console: Console) -> Iterator[dict[str, Any]]:
    """Write uploads, scores and robustness, and yield the result if the benchmark can be scored here."""
    for task in plan:
        lost = read_answers(task.out, task.selected).count(None)
        if lost:
            raise BenchmarkError(f"{lost} questions of {task} were evaluated, but their answers are gone from {answer_file(task.out)}")
    clean = plan[0]
    benchmark = clean.benchmark
    uploads = _write_uploads(clean, limit, console)
    if benchmark.score is None:
        if benchmark.judge is not None:
            command = judge_command(benchmark, clean.data, answer_file(clean.out))
            console.print(f"{benchmark.title}: a language model has to judge the answers:\n{command}", highlight=False, soft_wrap=True)
        return
    scored = {task.perturbation: _score(task) for task in plan}
    found = [_write_result(task, scored[task.perturbation], batch_size, [] if task.perturbation else uploads) for task in plan]
    yield found[0] | ({"robustness": _compare(clean, scored, console)} if len(plan) > 1 else {})


def _write_uploads(task: Task, limit: int | None, console: Console) -> list[Path]:
    """Write what the benchmark's server takes, if it has one and all questions were evaluated."""
    benchmark = task.benchmark
    if benchmark.upload is None:
        return []
    if limit is not None:
        console.print(f"{benchmark.title}: no upload, which would need the answers to all questions", highlight=False)
        return []
    uploads = benchmark.upload(task.data, task.selected, read_answers(task.out, task.selected), task.out)
    for upload in uploads:
        console.print(f"{benchmark.title}: {upload} is what its server takes", highlight=False, soft_wrap=True)
    return uploads


def _score(task: Task) -> Scored:
    assert task.benchmark.score is not None
    return task.benchmark.score(task.data, task.selected, read_answers(task.out, task.selected))


def _write_result(task: Task, scored: Scored, batch_size: int, uploads: Sequence[Path]) -> dict[str, Any]:
    found = result(task.benchmark, scored, task.selected, read_answers(task.out, task.selected))
    found |= {
        "questions_in_all": len(task.questions),
        "model": task.settings["checkpoint"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "generation": {name: task.settings[name] for name in (*GREEDY, "max_new_tokens", "dtype")} | {"batch_size": batch_size},
        "versions": {module.__name__: module.__version__ for module in (moe_llava, torch, transformers)},
        "uploads": [upload.name for upload in uploads],
    }
    if task.perturbation is not None:
        found["perturbation"] = asdict(task.perturbation)
    write_whole(task.out / "scored.jsonl", "".join(json.dumps(item, ensure_ascii=False, default=str) + "\n" for item in scored.items))
    write_whole(task.out / "result.json", json.dumps(found, indent=1) + "\n")
    return found


def _compare(clean: Task, scored: Mapping[Perturbation | None, Scored], console: Console) -> dict[str, Any]:
    """Write robustness.json and robustness.png beside the answers without perturbation, and return the first. `scored` is what this run
    evaluated. Perturbations of earlier runs are included if they had the same questions."""
    perturbed = {}
    for perturbation in (Perturbation(name, strength) for name in KINDS for strength in STRENGTHS):
        task = clean.under(perturbation)
        if perturbation in scored:
            perturbed[perturbation] = scored[perturbation].items
        elif (task.out / SETTINGS).is_file():
            check_settings(task.out, task.settings)
            if None in read_answers(task.out, task.selected):
                console.print(f"{task} has answers to fewer questions: left out", highlight=False)
            else:
                perturbed[perturbation] = _score(task).items
    model = clean.settings["checkpoint"]
    summary = {"benchmark": clean.benchmark.name, "model": model, **robustness(scored[None].items, perturbed, scored[None].units)}
    write_whole(clean.out / "robustness.json", json.dumps(summary, indent=1) + "\n")
    figure = plot_robustness(summary, f"{Path(model).name}, {clean.benchmark.title}")
    figure.savefig(clean.out / "robustness.png", dpi=110)
    plt.close(figure)
    return summary
