"""Files and folders that are whole or not there, and JSON lines of which the last may be cut off."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_llava.common.errors import DataError


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end, and is removed if an error comes first.

    Raises FileExistsError if `out` exists.
    """
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists already: choose another folder")
    new_parents = [parent for parent in out.parents if not parent.exists()]
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()  # which leaves alone what is not empty


def write_whole(file: Path, text: str) -> None:
    """Writes beside `file` and renames: it never holds half of the text."""
    partial = file.with_name(f".{file.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def drop_torn_line(file: Path) -> None:
    """Cuts off what was written of a line that never ended."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with file.open("r+b") as opened:
            opened.truncate(whole)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a log of JSON lines, without a last line that was cut off.

    Raises DataError, naming file and line, if one is no JSON object.
    """
    if not file.is_file():
        return []
    lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [_read_object(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises DataError, naming the file, if there is none in it."""
    return _read_object(file.read_bytes(), str(file))


def _read_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is damaged: it is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} is damaged: it must hold a JSON object, but holds {found!r}")
    return found
