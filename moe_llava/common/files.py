"""Write files and folders completely or not at all, read JSON that may be cut off, and explain why a write failed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_llava.common.errors import DataError
from moe_llava.common.messages import format_bytes

_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would exceed the limit on file sizes (ulimit -f)",
}
# Messages of torch when a write ends early. It drops the reason of the operating system.
_CUT_SHORT = re.compile(r"inline_container\.cc|PytorchStreamWriter failed|iostream error|file write failed")


def check_new(out: Path) -> None:
    """Raise FileExistsError if `out` exists."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists already: choose another folder")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into. It is renamed to `out` at the end, or removed after an error.

    Raises FileExistsError if `out` exists.
    """
    check_new(out)
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
                parent.rmdir()  # fails if it is not empty


def write_whole(file: Path, text: str) -> None:
    """Write beside `file` and rename, so that `file` never holds half of the text."""
    partial = file.with_name(f".{file.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def drop_torn_line(file: Path) -> None:
    """Remove a last line that has no end."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects in a log of JSON lines, without a last line that was cut off; an empty list if there is no file.

    Raises DataError, naming file and line, if a line is no JSON object.
    """
    if not file.is_file():
        return []
    lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [_parse_object(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises DataError, naming the file, if it holds none."""
    return _parse_object(file.read_bytes(), str(file))


def _parse_object(text: bytes, source: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{source} is damaged: it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{source} is damaged: it must hold a JSON object, but holds {found!r}")
    return found


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits, in constant memory."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def no_room(error: BaseException) -> bool:
    """Return whether `error`, raised while a file was written, means that there was no room for it."""
    return _error_number(error) in _NO_ROOM or _is_cut_short(error)


def why_not_written(error: BaseException, folder: Path) -> str:
    """Return the reason for `error`, raised while a file in `folder` was written. Call it before the partial file is removed."""
    if not no_room(error):
        return str(error)
    free = f"{format_bytes(shutil.disk_usage(folder).free)} are free in {folder}"
    if not _is_cut_short(error):
        return f"{_NO_ROOM[_error_number(error)]}: {free}"
    import resource  # does not exist on Windows

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    limited = "" if limit == resource.RLIM_INFINITY else f", or the limit on file sizes is reached (ulimit -f, {format_bytes(limit)})"
    return f"the disk is full, or a quota is used up{limited}: {free}"


def _is_cut_short(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _CUT_SHORT.search(str(error)) is not None


def _error_number(error: BaseException) -> int:
    """Return the number of an operating system's error, which safetensors gives only in its message; 0 if there is none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else 0
