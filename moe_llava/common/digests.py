"""Digests by which files are known: by their content, not by name, size or time."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits. Reads in pieces, so memory stays constant."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
