"""A run among other processes: it locks the stages that it trains, and it stops after a save when it gets a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import torch
from filelock import FileLock, Timeout
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_llava.training.parsing import RecipeError


def lock_file(output: Path, name: str) -> Path:
    """Return the lock file of a stage. A killed run leaves it behind, but not locked: the kernel's lock ends with the process."""
    return output / f".{name}.lock"


@contextlib.contextmanager
def lock_stages(output: Path, names: list[str]) -> Iterator[None]:
    """Hold the locks of all stages in `names`. Lock files, and folders made for them, are removed at the end.

    Raises RecipeError if another run holds one, or if `output` cannot be a folder.
    """
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RecipeError(f"output is {output}, but {error.filename} is no folder") from error
    with contextlib.ExitStack() as stack:
        for folder in reversed(missing):
            stack.callback(_remove_if_empty, folder)
        for name in names:
            stack.enter_context(_lock(output, name))
        yield


@contextlib.contextmanager
def _lock(output: Path, name: str) -> Iterator[None]:
    file = lock_file(output, name)
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        holder = _read_holder(file)
        raise RecipeError(f"another run{holder} is at {output / name}: wait until it ends, stop it, or choose another output") from None
    try:
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        file.unlink(missing_ok=True)  # before it is released: afterwards it could be another run's
        lock.release()


def _read_holder(file: Path) -> str:
    """Return who holds a lock, in parentheses; nothing if the holder has not written it yet, or has just ended."""
    try:
        holder = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    return f" ({holder})" if holder else ""


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()  # which leaves alone what is not empty


class Begun:
    """A file in `output` by which processes that torchrun starts again know that they are to resume, and not to refuse stages that exist.

    It is named by torchrun's run id, which --standalone draws and --rdzv-id sets, because the number of restarts is not the same on all
    machines. Without an id there is no file.
    """

    def __init__(self, output: Path):
        run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        self.file = None if run == "none" else output / f".{quote(run, safe='')}.begun"

    def __bool__(self) -> bool:
        return self.file is not None and self.file.exists()

    def write(self) -> None:
        if self.file is not None:
            self.file.touch()

    def remove(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)


class StopWhenAsked(TrainerCallback):
    """On SIGTERM or Ctrl-C, finish and save the step in all processes, then end training. A second Ctrl-C acts at once; SIGTERM may well
    come twice, from a scheduler and from torchrun."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopWhenAsked:
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # whatever logging_steps is: the picture ends where the run does
        asked = self.asked
        if args.world_size > 1:
            anybody = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(anybody, torch.distributed.ReduceOp.MAX)
            asked = bool(anybody)
        if asked:
            control.should_save = control.should_training_stop = True
