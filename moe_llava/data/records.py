"""Conversation files, JSON lists or JSON lines, read and checked as a whole before any long work starts. Two forms of records:

{"id": "7", "image": "7.png", "conversations": [{"from": "human", "value": "<image>\\nWhere?"}, {"from": "gpt", "value": "here"}]}
{"id": "7", "images": ["7.png"], "messages": [{"role": "user", "content": "<image>\\nWhere?"}, {"role": "assistant", "content": "here"}]}

In the second, content may also be a list of parts: {"type": "image"} and {"type": "text", "text": "Where?"}.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

IMAGE_TOKEN = "<image>"
MOST_SHOWN = 20
# key of the turns, (key of a turn's role, of its text), the roles
FORMS = (
    ("conversations", ("from", "value"), ("human", "gpt")),
    ("messages", ("role", "content"), ("user", "assistant")),
)


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

    Raises DataError, with all problems: file missing or no JSON, a record without conversation, roles out of order, more or fewer
    `<image>` than images, an image that is missing.
    """
    records, problems = [], []
    for source, item in read_items(file):
        try:
            records.append(parse_record(source, item, Path(images)))
        except DataError as error:
            problems.append(str(error))
    if problems:
        shown = problems[:MOST_SHOWN]
        rest = [f"and {len(problems) - len(shown)} more: `moe-llava check {file}` shows all"] if len(problems) > len(shown) else []
        raise DataError("\n  ".join([*shown, *rest]))
    return records


def read_items(file: str | Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, the record as it stands there) of a JSON list, or of JSON lines, which a file is that does not begin with `[`.

    Raises DataError if the file is missing, empty, or neither.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError(f"data file {file} does not exist")
    with file.open(encoding="utf-8") as opened:
        start = opened.read(1).strip()
        opened.seek(0)
        if start != "[":
            yield from _read_lines(file, opened)
            return
        try:
            items = json.load(opened)
        except json.JSONDecodeError as error:
            raise DataError(f"{file} is not JSON: {error}") from error
    if not items:
        raise DataError(f"{file} must hold at least one record, but its list is empty")
    yield from ((f"record {index} of {file}", item) for index, item in enumerate(items))


def _read_lines(file: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    found = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = True
        try:
            yield f"line {number} of {file}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file} is neither a JSON list nor JSON lines: line {number}: {error}") from error
    if not found:
        raise DataError(f"{file} is empty")


def weighted(records: list[Record], weight: float, seed: int) -> list[Record]:
    """`records` as often as `weight` says; of its fraction, so many of them, drawn without repetition and kept in order."""
    times, fraction = divmod(weight, 1)
    drawn = random.Random(seed).sample(range(len(records)), round(fraction * len(records)))
    return records * int(times) + [records[index] for index in sorted(drawn)]


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


def parse_record(source: str, item: Any, images: Path) -> Record:
    """Raises DataError, naming `source` and the rule, for the first thing wrong with a record."""
    values = _turns(source, item)
    names = item.get("image", item.get("images", []))
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{source} must have a file name or a list of them as 'image', but has {str(names)[:60]}")
    found = sum(value.count(IMAGE_TOKEN) for value in values)
    if found != len(names):
        raise DataError(f"found {found} image tokens in {source} but {len(names)} images")
    paths = tuple(images / name for name in names)
    for path in paths:
        if not path.is_file():
            raise DataError(f"{source} names the image {path}, which does not exist")
    turns = tuple(zip(values[::2], values[1::2], strict=True))
    known = ("conversations", "messages", "image", "images")
    return Record(source, turns, paths, {key: value for key, value in item.items() if key not in known})


def _turns(source: str, item: Any) -> list[str]:
    """The texts of a record, questions and answers in turn."""
    for key, (role_key, text_key), roles in FORMS:
        if not isinstance(item, dict) or key not in item:
            continue
        turns = item[key]
        if not isinstance(turns, list) or not turns or len(turns) % 2:
            raise DataError(f"{source} must have {key!r}, a list of {roles[0]} and {roles[1]} turns in pairs, but has {str(turns)[:60]}")
        values = []
        for number, turn in enumerate(turns):
            role, text = role_and_text(turn, role_key, text_key)
            if role != roles[number % 2] or text is None:
                raise DataError(f"turn {number} of {source} must be a text from {roles[number % 2]!r}, but is {str(turn)[:60]}")
            if number % 2 and not text.strip():
                raise DataError(f"turn {number} of {source} is an empty answer: nothing to learn from")
            if number % 2 and IMAGE_TOKEN in text:
                raise DataError(f"turn {number} of {source} is an answer with {IMAGE_TOKEN}, which only human turns may hold")
            values.append(text)
        return values
    raise DataError(f"{source} must have 'conversations' or 'messages', but is {str(item)[:60]}")


def role_and_text(turn: Any, role_key: str, text_key: str) -> tuple[Any, str | None]:
    """Who says what in a turn; None for what it does not say."""
    return (turn.get(role_key), text_of(turn.get(text_key))) if isinstance(turn, dict) else (None, None)


def text_of(content: Any) -> str | None:
    """A turn's text, of a string or of parts, which stand on lines of their own; None of anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = IMAGE_TOKEN if kind == "image" else part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "\n".join(texts)
