"""What a stage leaves behind while it runs: saves that are whole or not there, logs that fit them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moe_llava.common.errors import DataError
from moe_llava.common.files import no_room, read_lines, why_not_written, write_whole
from moe_llava.common.messages import format_bytes

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
    return sorted(work.glob("checkpoint-*"), key=step_of)


def step_of(save: Path) -> int:
    """Return the step after which a save was made."""
    return int(save.name.removeprefix("checkpoint-"))


@contextlib.contextmanager
def saving(work: Path, what: str) -> Iterator[Path]:
    """Yield a folder to write into. It is removed again if writing fails.

    Raises SaveError instead of what torch, safetensors and the operating system raise when a file cannot be written.
    """
    folder = work / SAVING
    try:
        yield folder
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = why_not_written(error, work)
        shutil.rmtree(folder, ignore_errors=True)
        kept = "nothing was saved before"
        if found := saves(work):
            kept = f"{found[-1]} is whole: go on from it with --resume"
            if no_room(error):
                reason += f", and the last save took {format_bytes(sum(file.stat().st_size for file in found[-1].rglob('*')))}"
        raise SaveError(f"{what} could not be saved in {work}: {reason}; {kept}") from error


def keep(folder: Path, work: Path, limit: int) -> None:
    """Move a whole save out of `folder` into `work`, and remove all but the last `limit`."""
    for save in folder.iterdir():
        save.rename(work / save.name)
    shutil.rmtree(folder)
    for old in saves(work)[:-limit]:
        shutil.rmtree(old)


def remove_leftovers(work: Path) -> None:
    """Remove what a killed run had not completed: half a save, or half of an adapter's base."""
    for folder in (work / SAVING, *work.glob(".*.partial")):
        if folder.is_dir():
            shutil.rmtree(folder)


def remove_saves(folder: Path) -> None:
    for save in saves(folder):
        shutil.rmtree(save)


@contextlib.contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Raise SaveError, naming the reason and `folder`, instead of an error that says that there was no room for a file."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, SaveError) or not no_room(error):
            raise
        raise SaveError(
            f"a file could not be written in {folder}: {why_not_written(error, folder)}; make room, then go on with --resume"
        ) from error


def append_line(file: Path, *entries: dict[str, Any]) -> None:
    """Append JSON lines to a log of a stage. Raises SaveError if they cannot be written."""
    with saving(file.parent, file.name), file.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(entry) + "\n" for entry in entries))


def rewind(file: Path, step: int) -> None:
    """Take the lines of steps after `step` out of a log: they will be made again."""
    if not file.is_file():
        return
    lines = read_lines(file)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line.get("step"), int):
            raise DataError(f"{file}, line {number} is damaged: it has no step")
    write_whole(file, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
