"""LLaVA conversation files: a JSON list of records, read and checked as a whole before any long work starts.

{"id": "7", "image": "7.png", "conversations": [{"from": "human", "value": "<image>\\nWhere?"}, {"from": "gpt", "value": "here"}]}
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

IMAGE_TOKEN = "<image>"
ROLES = ("human", "gpt")


class DataError(ValueError):
    """Something is wrong with a data file; the message names file, record, value and rule."""


@dataclass(frozen=True)
class Record:
    """One conversation. `source` says where it stands, for messages; `extra` holds the keys that are not LLaVA's own."""

    source: str
    turns: tuple[tuple[str, str], ...]  # (human, answer)
    images: tuple[Path, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def messages(self) -> list[dict[str, Any]]:
        """The conversation in the form that transformers' chat templates take."""
        messages: list[dict[str, Any]] = []
        for question, answer in self.turns:
            messages.append({"role": "user", "content": content_parts(question)})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return messages


def content_parts(text: str) -> list[dict[str, str]]:
    """Cuts a human turn at its `<image>` placeholders."""
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(IMAGE_TOKEN)):
        if index:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def load_records(file: str | Path, images: str | Path) -> list[Record]:
    """Reads `file` and checks every record; image names are relative to the folder `images`.

    Raises DataError for the first thing wrong: file missing or no JSON, a record without conversation, roles out of order, more or fewer
    `<image>` than
    images, an image that is missing.
    """
    file, images = Path(file), Path(images)
    if not file.is_file():
        raise DataError(f"data file {file} does not exist")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{file} must hold a list of at least one record, but holds {type(raw).__name__} {str(raw)[:40]}")
    return [_read_record(f"record {index} of {file}", item, images) for index, item in enumerate(raw)]


def open_image(path: Path, source: str) -> Image.Image:
    """Decodes an image to RGB. Raises DataError, naming `source`, if that cannot be done."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"{source} names the image {path}, which does not exist") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{source} names the image {path}, which cannot be decoded: {error}") from error


def check_images(records: list[Record]) -> None:
    """Decodes every image once. Raises DataError for the first that fails."""
    named_in = {path: record.source for record in records for path in record.images}
    for path, source in named_in.items():
        open_image(path, source)


def _read_record(source: str, item: Any, images: Path) -> Record:
    conversations = item.get("conversations") if isinstance(item, dict) else None
    if not isinstance(conversations, list) or not conversations or len(conversations) % 2:
        raise DataError(f"{source} must have 'conversations', a list of human and gpt turns in pairs, but has {str(conversations)[:60]}")
    for number, turn in enumerate(conversations):
        role, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if role != ROLES[number % 2] or not isinstance(value, str):
            raise DataError(f"turn {number} of {source} must be a text from {ROLES[number % 2]!r}, but is {str(turn)[:60]}")
        if role == "gpt" and not value.strip():
            raise DataError(f"turn {number} of {source} is an empty answer: nothing to learn from")
        if role == "gpt" and IMAGE_TOKEN in value:
            raise DataError(f"turn {number} of {source} is an answer with {IMAGE_TOKEN}, which only human turns may hold")
    names = item.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{source} must have a file name or a list of them as 'image', but has {str(names)[:60]}")
    found = sum(turn["value"].count(IMAGE_TOKEN) for turn in conversations)
    if found != len(names):
        raise DataError(f"found {found} image tokens in {source} but {len(names)} images")
    paths = tuple(images / name for name in names)
    for path in paths:
        if not path.is_file():
            raise DataError(f"{source} names the image {path}, which does not exist")
    values = [turn["value"] for turn in conversations]
    turns = tuple(zip(values[::2], values[1::2], strict=True))
    return Record(source, turns, paths, {key: value for key, value in item.items() if key not in ("conversations", "image")})
