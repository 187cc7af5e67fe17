"""Why a file could not be written, also where a library hides it."""

from __future__ import annotations

import errno
import re
import resource
import shutil
from pathlib import Path

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would exceed the limit on file sizes (ulimit -f)",
}
# What torch raises when a write ends early; it drops the reason that the operating system gave.
CUT_SHORT = re.compile(r"inline_container\.cc|PytorchStreamWriter failed|iostream error|file write failed")


def no_room(error: BaseException) -> bool:
    """Return whether `error`, raised while a file was written, says that there was no room for it."""
    return _number(error) in REASONS or _cut_short(error)


def why_not_written(error: BaseException, folder: Path) -> str:
    """Return the reason for `error`, which was raised while a file in `folder` was written. Call before what was written is removed."""
    if not no_room(error):
        return str(error)
    free = f"{size(shutil.disk_usage(folder).free)} are free in {folder}"
    if not _cut_short(error):
        return f"{REASONS[_number(error)]}: {free}"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    limited = "" if limit == resource.RLIM_INFINITY else f", or the limit on file sizes is reached (ulimit -f, {size(limit)})"
    return f"the disk is full, or a quota is used up{limited}: {free}"


def size(number: float) -> str:
    """Return a number of bytes as people read it, such as 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.1f} {unit}" if unit != "bytes" else f"{number:.0f} bytes"
        number /= 1000
    return f"{number:,.1f} TB"


def _cut_short(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and CUT_SHORT.search(str(error)) is not None


def _number(error: BaseException) -> int:
    """Return the number of an operating system's error, which safetensors only has in its text; 0 if there is none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else 0
