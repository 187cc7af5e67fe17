"""One run per stage folder. The lock is the kernel's: it ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from moe_llava.training.parsing import RecipeError


def lock_file(output: Path, name: str) -> Path:
    """Return the file by which a stage is locked. It may be there without a lock: a killed run leaves it."""
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
