"""What a stage leaves behind while it runs: saves that are whole or not there, logs that fit them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

SAVING = ".saving"


class SaveError(OSError):
    """A save failed, for want of space for example; the message says what there still is."""


class Stopped(Exception):
    """A run was asked to stop, and did, after a save."""


def work_folder(final: Path) -> Path:
    """Where a stage lives until it is complete."""
    return final.with_name(f".{final.name}")


def saves(work: Path) -> list[Path]:
    """All saves of a stage, oldest first. Each is written under another name and renamed, so what is here is whole."""
    return sorted(work.glob("checkpoint-*"), key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


@contextlib.contextmanager
def saving(work: Path, what: str) -> Iterator[Path]:
    """A folder to write into. It is removed again if writing fails.

    Raises SaveError instead of what torch, safetensors and the operating system raise when a file cannot be written.
    """
    folder = work / SAVING
    try:
        yield folder
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        kept = f"{saves(work)[-1]} is whole: go on from it with --resume" if saves(work) else "nothing was saved before"
        raise SaveError(f"{what} could not be saved in {work}: {error}; {kept}") from error


def keep(folder: Path, work: Path, limit: int) -> None:
    """Moves a whole save out of `folder` into `work`, and removes all but the last `limit`."""
    for save in folder.iterdir():
        shutil.rmtree(work / save.name, ignore_errors=True)
        save.rename(work / save.name)
    shutil.rmtree(folder)
    for old in saves(work)[:-limit]:
        shutil.rmtree(old)


def remove_saves(folder: Path) -> None:
    for save in saves(folder):
        shutil.rmtree(save)


def write_whole(file: Path, text: str) -> None:
    """Writes beside `file` and renames: it never holds half of the text."""
    partial = file.with_name(f".{file.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """JSON lines; a last one that was cut off is left out."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewind(file: Path, step: int) -> None:
    """Takes the lines of steps after `step` out of a log: they will be made again."""
    if file.is_file():
        write_whole(file, "".join(json.dumps(line) + "\n" for line in read_lines(file) if line["step"] <= step))
