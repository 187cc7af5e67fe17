"""New folders, which appear when they are complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


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
