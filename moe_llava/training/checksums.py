"""Checksums of what a stage writes: damaged files are found before anything starts from them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moe_llava.common.files import file_digest

MANIFEST = "checksums.json"


def write_manifest(folder: Path, files: Iterable[Path]) -> None:
    """Write size and SHA-256 of `files`, which are in `folder`, into its manifest."""
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        for file in sorted(files)
        if file.is_file() and file.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def find_damage(folder: Path) -> list[str]:
    """Return a sentence for each file of a folder's manifest that is not as it was written, and for a manifest that cannot be read."""
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


def find_unreadable(save: Path) -> list[str]:
    """Return what can be found without a manifest: files of a save that are missing, cut off, or fail their format's own checks."""
    needed = ("trainer_state.json", "scheduler.pt", "optimizer*", "rng_state*")
    problems = [f"{save / name} is missing" for name in needed if not any(save.glob(name))]
    for file in sorted(path for path in save.rglob("*") if path.is_file()):
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            elif file.suffix == ".safetensors":
                with safe_open(file, "numpy"):
                    pass
            elif file.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(file) as archive:
                    damaged = archive.testzip()
                if damaged:
                    raise ValueError(f"its part {damaged} has a wrong checksum")
        except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
            problems.append(f"{file} is damaged: {error}")
    return problems
