"""One conversation, and the rules that it has to keep. Two forms of records:

{"id": "7", "image": "7.png", "conversations": [{"from": "human", "value": "<image>\\nWhere?"}, {"from": "gpt", "value": "here"}]}
{"id": "7", "images": ["7.png"], "messages": [{"role": "user", "content": "<image>\\nWhere?"}, {"role": "assistant", "content": "here"}]}

In the second, content may also be a list of parts: {"type": "image"} and {"type": "text", "text": "Where?"}.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from moe_llava.common.errors import DataError

IMAGE_TOKEN = "<image>"
IMAGE_KEYS = ("image", "images")
# key of the turns, (key of a turn's role, of its text), the roles
FORMS = (
    ("conversations", ("from", "value"), ("human", "gpt")),
    ("messages", ("role", "content"), ("user", "assistant")),
)


@dataclass(frozen=True)
class StoredImage:
    """An image that stands in a row of a `datasets` folder, rather than in a file of its own."""

    folder: Path
    row: int
    number: int

    def __str__(self) -> str:
        return f"{self.number} of row {self.row} of {self.folder}"

    def open(self) -> BinaryIO:
        from moe_llava.data.folders import image_values  # what reads such folders takes a second to import, and few have one

        value = image_values(self.folder, self.row)[self.number]
        return BytesIO(value["bytes"]) if value["bytes"] is not None else Path(value["path"]).open("rb")


@dataclass(frozen=True)
class Record:
    """One conversation. `source` says where it stands, for messages; `extra` holds the keys that are not LLaVA's own; `system` is the
    system prompt, empty for that of the conversation form."""

    source: str
    turns: tuple[tuple[str, str], ...]  # (human, answer)
    images: tuple[Path | StoredImage, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    system: str = ""

    def messages(self) -> list[dict[str, Any]]:
        """The conversation in the form that transformers' chat templates take."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
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


def parse_record(source: str, item: Any, images: Path) -> Record:
    """Whether its images exist is not looked at.

    Raises DataError, naming `source` and the rule, for the first thing wrong with a record.
    """
    system, values = _turns(source, item)
    if not "".join([system, *values]).isascii():
        check_characters(source, [system, *values])
    names: Any = next((item[key] for key in IMAGE_KEYS if item.get(key) is not None), [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, (str, StoredImage)) for name in names):
        raise DataError(f"{source} must have a file name or a list of them as 'image', but has {str(names)[:60]}")
    found = sum(value.count(IMAGE_TOKEN) for value in values)
    if found != len(names):
        raise DataError(f"found {found} image tokens in {source} but {len(names)} images")
    places = tuple(images / name if isinstance(name, str) else name for name in names)
    turns = tuple(zip(values[::2], values[1::2], strict=True))
    known = {key for key, *_ in FORMS} | {*IMAGE_KEYS, "system"}
    return Record(source, turns, places, {key: value for key, value in item.items() if key not in known}, system)


def check_characters(source: str, texts: list[str]) -> None:
    """Raises DataError, naming `source`, if a text holds what no tokenizer can read."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{source} holds half of a character, {text[error.start : error.end]!a}, which is no text") from error


def _turns(source: str, item: Any) -> tuple[str, list[str]]:
    """(system prompt, texts of a record, questions and answers in turn)."""
    for key, (role_key, text_key), roles in FORMS:
        if not isinstance(item, dict) or key not in item:
            continue
        system, turns = split_system(item, item[key], role_key, text_key)
        if not isinstance(system, str) or IMAGE_TOKEN in system:
            raise DataError(f"{source} must have a text without {IMAGE_TOKEN} as its system prompt, but has {str(system)[:60]}")
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
        return system, values
    raise DataError(f"{source} must have 'conversations' or 'messages', but is {str(item)[:60]}")


def split_system(item: Any, turns: Any, role_key: str, text_key: str) -> tuple[Any, Any]:
    """(system prompt, the other turns): the first turn may be one, or the record have it as `system`."""
    system = item.get("system") or ""
    if isinstance(turns, list) and turns:
        role, text = role_and_text(turns[0], role_key, text_key)
        if role == "system":
            return text, turns[1:]
    return system, turns


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
