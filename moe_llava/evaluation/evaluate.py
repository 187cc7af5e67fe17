"""From a checkpoint to answers, scores and uploads.

Every benchmark has a folder under `out` (see answers.py), with one inside for each perturbation. A run goes on where the one before was
stopped, with as many processes as it likes: each asks its share of the questions that have no answer yet, and process 0 scores.
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
from moe_llava.checkpoints.load import best_device, load_checkpoint
from moe_llava.checkpoints.offload import load_offloaded
from moe_llava.common.files import write_whole
from moe_llava.common.progress import show_progress
from moe_llava.evaluation.ask.answers import SETTINGS, answer_file, begin, check_settings, given, line, merge, writing
from moe_llava.evaluation.ask.generate import answer
from moe_llava.evaluation.ask.tasks import GREEDY, Task, plan_tasks
from moe_llava.evaluation.score.benchmark import BenchmarkError, Question, Scored, result
from moe_llava.evaluation.score.scoring import judge_command
from moe_llava.evaluation.stress.perturb import ADVERSARIAL, KINDS, STRENGTHS, Perturbation
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
) -> Iterator[dict[str, Any]]:
    """Yields, benchmark after benchmark, what its result.json holds and, as "robustness", what its robustness.json does; nothing in
    processes other than the first. `limit`: only so many questions of each. `perturbations`: to ask under, one at a time, after the
    questions as they are. `keep_experts`: the share of the experts that has room in memory; None: all.

    Raises CheckpointError or BenchmarkError, with all that is wrong with files and folders, before the model is loaded; later, what is
    wrong with an image, or with a score, once everything has been asked.
    """
    attacks = sorted({perturbation.name for perturbation in perturbations} & set(ADVERSARIAL))
    if attacks and keep_experts is not None:
        raise BenchmarkError(f"{' and '.join(attacks)} need the model's gradient, which experts that are not all in memory do not have")
    plans = plan_tasks(checkpoint, names, data, out, limit, perturbations)
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
        shares = {str(task): _share(_left(task), process, processes) for plan in plans for task in plan}
        if any(shares.values()):
            if keep_experts is None:
                model, processor = load_checkpoint(checkpoint)
                model.to(best_device())
            else:
                model, processor, _ = load_offloaded(checkpoint, keep_experts)
            tell_of_capacity(model, console)
        for plan in plans:
            for task in plan:
                if shares[str(task)]:
                    _ask(task, shares[str(task)], model, processor, batch_size, process, console)
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


def tell_of_capacity(model: Any, console: Console) -> None:
    """Says so if answers are not those to one question at a time."""
    if getattr(model.config, "capacity_factor", None) is not None:
        console.print("this model's experts have a capacity, which questions asked together share: answers depend on their company")


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
            file.write("".join(line(share[index], text, model_id, task.perturbation) for index, text in batch))
            file.flush()
            advance(len(batch))


def _finish(plan: list[Task], batch_size: int, limit: int | None, console: Console) -> Iterator[dict[str, Any]]:
    """Uploads, scores and what perturbations cost: the result, if the benchmark can be scored here."""
    for task in plan:
        lost = sum(text is None for text in given(task.out, task.asked))
        if lost:
            raise BenchmarkError(f"{lost} questions of {task} have been asked, but their answers are gone from {answer_file(task.out)}")
    clean = plan[0]
    benchmark = clean.benchmark
    uploads = _write_uploads(clean, limit, console)
    if benchmark.score is None:
        if benchmark.judge is not None:
            command = judge_command(benchmark, clean.data, answer_file(clean.out))
            console.print(f"{benchmark.title}: a language model has to judge the answers:\n{command}", highlight=False, soft_wrap=True)
        return
    scored = {task.perturbation: _scored(task) for task in plan}
    found = _write_result(clean, scored[None], batch_size, uploads)
    for task in plan[1:]:
        _write_result(task, scored[task.perturbation], batch_size, [])
    yield found | ({"robustness": _compare(clean, scored, console)} if len(plan) > 1 else {})


def _write_result(task: Task, scored: Scored, batch_size: int, uploads: Sequence[Path]) -> dict[str, Any]:
    found = result(task.benchmark, scored, task.asked, given(task.out, task.asked))
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
    write_whole(task.out / "result.json", json.dumps(found, indent=1) + "\n")
    return found


def _write_uploads(task: Task, limit: int | None, console: Console) -> list[Path]:
    """What the benchmark's server takes, if it has one, and all questions were asked."""
    benchmark = task.benchmark
    if benchmark.upload is None:
        return []
    if limit is not None:
        console.print(f"{benchmark.title}: no upload, which would need the answers to all questions", highlight=False)
        return []
    uploads = benchmark.upload(task.data, task.asked, given(task.out, task.asked), task.out)
    for upload in uploads:
        console.print(f"{benchmark.title}: {upload} is what its server takes", highlight=False, soft_wrap=True)
    return uploads


def _scored(task: Task) -> Scored:
    assert task.benchmark.score is not None
    return task.benchmark.score(task.data, task.asked, given(task.out, task.asked))


def _compare(clean: Task, scored: Mapping[Perturbation | None, Scored], console: Console) -> dict[str, Any]:
    """Writes robustness.json and robustness.png beside the answers to the questions as they are, and returns the first. `scored`: what this
    run was asked for. Perturbations of runs before are in the files, too, where the same questions were asked."""
    perturbed = {}
    for perturbation in (Perturbation(name, strength) for name in KINDS for strength in STRENGTHS):
        task = clean.under(perturbation)
        if perturbation in scored:
            perturbed[perturbation] = scored[perturbation].items
        elif (task.out / SETTINGS).is_file():
            check_settings(task.out, task.settings)
            if None in given(task.out, task.asked):
                console.print(f"{task} was asked fewer questions than these: left out", highlight=False)
            else:
                perturbed[perturbation] = _scored(task).items
    model = clean.settings["checkpoint"]
    summary = {"benchmark": clean.benchmark.name, "model": model, **robustness(scored[None].items, perturbed, scored[None].units)}
    write_whole(clean.out / "robustness.json", json.dumps(summary, indent=1) + "\n")
    figure = plot_robustness(summary, f"{Path(model).name}, {clean.benchmark.title}")
    figure.savefig(clean.out / "robustness.png", dpi=110)
    plt.close(figure)
    return summary
