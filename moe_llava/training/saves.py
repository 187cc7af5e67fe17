"""The files of a stage while it runs: saves that are whole or not there, their checksums, and logs that fit them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moe_llava.common.errors import DataError
from moe_llava.common.files import file_digest, no_room, read_lines, why_not_written, write_whole
from moe_llava.common.messages import format_bytes

SAVING = ".saving"  # a folder: the save that is being written
MANIFEST = "checksums.json"
OPTIMIZER = "optimizer_shards"  # a folder of a sharded run's save: the optimizer's state, by name, for any number of processes


class SaveError(OSError):
    """A save failed, for want of space for example. The message names the last whole save."""


class Stopped(Exception):
    """A run got a signal, and stopped after a save."""


def saves(work: Path) -> list[Path]:
    """Return all saves of a stage, oldest first. Each was written under another name and renamed, so it is whole."""
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
            kept = f"{found[-1]} is whole: continue from it with --resume"
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
    """Remove what a killed run left incomplete: half a save, or half of an adapter's base."""
    for folder in (work / SAVING, *work.glob(".*.partial")):
        if folder.is_dir():
            shutil.rmtree(folder)


def remove_saves(folder: Path) -> None:
    for save in saves(folder):
        shutil.rmtree(save)


@contextlib.contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Raise SaveError, which names `folder` and why there is no room in it, instead of other errors for want of room."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, SaveError) or not no_room(error):
            raise
        raise SaveError(
            f"a file could not be written in {folder}: {why_not_written(error, folder)}; make room, then continue with --resume"
        ) from error


def append_line(file: Path, *entries: dict[str, Any]) -> None:
    """Append JSON lines to a log of a stage. Raises SaveError if they cannot be written."""
    with saving(file.parent, file.name), file.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(entry) + "\n" for entry in entries))


def rewind(file: Path, step: int) -> None:
    """Remove the lines of steps after `step` from a log: these steps will be logged again."""
    if not file.is_file():
        return
    lines = read_lines(file)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line.get("step"), int):
            raise DataError(f"{file}, line {number} is damaged: it has no step")
    write_whole(file, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))


def write_manifest(folder: Path, files: Iterable[Path]) -> None:
    """Write size and SHA-256 of `files`, which are in `folder`, into its manifest."""
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        for file in sorted(files)
        if file.is_file() and file.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def find_damage(folder: Path) -> list[str]:
    """Return a sentence for each file that is not as the folder's manifest says, or for a manifest that cannot be read."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return [f"{folder / MANIFEST} cannot be read ({error})"]
    if not expected:
        return [f"{folder / MANIFEST} is damaged: it names no file"]
    return [problem for name, (length, digest) in expected.items() if (problem := _damage(folder / name, length, digest))]


def _damage(file: Path, length: int, digest: str) -> str:
    if not file.is_file():
        return f"{file} is missing"
    if (found := file.stat().st_size) != length:
        return f"{file} is damaged: it holds {found:,} bytes, but {length:,} were written"
    try:
        return "" if file_digest(file) == digest else f"{file} is damaged: its SHA-256 is not that of what was written"
    except OSError as error:
        return f"{file} cannot be read ({error})"
