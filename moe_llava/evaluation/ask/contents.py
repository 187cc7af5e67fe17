"""Digests of what an evaluation or an experiment reads. A file keeps its digest when it is copied or touched, and gets another one when its
content changes, whatever its name and time say.

Every start reads these files once. SHA-256 takes about a second per gigabyte, and the pages are then in the cache for the next reader.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from os.path import abspath
from pathlib import Path

from transformers import AutoConfig

from moe_llava.common.errors import CheckpointError
from moe_llava.common.files import file_digest
from moe_llava.common.images import ImageSource
from moe_llava.common.messages import first_line
from moe_llava.evaluation.score.questions import Question
from moe_llava.evaluation.score.reading import BenchmarkError

LENGTH = 16  # hexadecimal digits: enough to tell files apart, and short enough to list many
# Weights, configurations, tokenizer, chat template. Logs and plots of a training stage do not affect answers.
CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".gguf")


def content_digest(file: Path) -> str:
    return file_digest(file)[:LENGTH]


def checkpoint_digests(checkpoint: str) -> dict[str, str | None]:
    """Return file name -> digest for a folder, or the revision of a hub id. Raises CheckpointError if it is neither."""
    folder = Path(checkpoint)
    if folder.is_dir():
        return {file.name: content_digest(file) for file in visible(folder.iterdir()) if file.suffix in CHECKPOINT_SUFFIXES}
    try:
        return {"revision": AutoConfig.from_pretrained(checkpoint)._commit_hash}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be loaded: {first_line(error)}") from error


def picture_name(picture: Path | ImageSource, folder: Path) -> str:
    """Return the name of a picture, video or frame. That of a file is its path, in the benchmark's `folder` if it is there; the folder of a
    user's own file is the one that it is in."""
    if not isinstance(picture, Path):
        return str(picture)
    return _name(Path(abspath(picture)), Path(abspath(folder if folder.is_dir() else folder.parent)))


def picture_digests(questions: Iterable[Question], folder: Path) -> dict[str, str]:
    """Return `picture_name` -> digest for each picture, video or frame of the questions. Raises BenchmarkError if an image in a row cannot
    be read."""
    digests = {}
    for image in dict.fromkeys(image for question in questions for image in question.media):
        if isinstance(image, Path):
            digests[picture_name(image, folder)] = content_digest(image)
        else:
            try:
                with image.open() as file:
                    digests[picture_name(image, folder)] = hashlib.sha256(file.read()).hexdigest()[:LENGTH]
            except OSError as error:  # a row may name a file
                raise BenchmarkError(f"the image {image} cannot be read: {error}") from error
    return digests


def joint_digest(files: Iterable[Path], folder: Path) -> str:
    """Return one digest for many files: for their paths, relative to `folder` if they are in it, and their contents. A file that does not
    exist counts as missing."""
    digest = hashlib.sha256()
    for file in sorted(set(files)):
        line = f"{_name(file, folder)} {file_digest(file) if file.is_file() else 'missing'}\n"
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:LENGTH]


def _name(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)


def visible(files: Iterable[Path]) -> list[Path]:
    """Return the files among `files` in order, without hidden ones: file managers write these beside what they show and copy."""
    return sorted(file for file in files if not file.name.startswith(".") and file.is_file())
