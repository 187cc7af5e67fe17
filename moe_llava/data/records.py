"""One conversation, and the rules that it has to keep. Two forms of records:

{"id": "7", "image": "7.png", "conversations": [{"from": "human", "value": "<image>\\nWhere?"}, {"from": "gpt", "value": "here"}]}
{"id": "7", "images": ["7.png"], "messages": [{"role": "user", "content": "<image>\\nWhere?"}, {"role": "assistant", "content": "here"}]}

In the second, content may also be a list of parts: {"type": "image"} and {"type": "text", "text": "Where?"}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_llava.common.errors import DataError
from moe_llava.data.folders import IMAGE_KEYS, StoredImage

IMAGE_TOKEN = "<image>"
MEDIA_KEYS = ("video", "videos", "video_path", "audio", "audios", "audio_path", "speech")
NO_NAME = ("", "none", "null", "nan")  # what stands for no file name in tables that became JSON
# A placeholder of another medium. With its end tag, or in backquotes, it is HTML that the text is about.
_MEDIA = re.compile(r"(?<!`)<(video|audio|speech)>(?!`)", re.IGNORECASE)
# key of the turns, (key of a turn's role, of its text), the roles
FORMS = (
    ("conversations", ("from", "value"), ("human", "gpt")),
    ("messages", ("role", "content"), ("user", "assistant")),
)


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
            parts = content_parts(question) if self.images else [{"type": "text", "text": question}]
            messages.append({"role": "user", "content": parts})
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
    """Whether its images exist is not looked at. `item` is what `read_items` gives: a DataError where nothing could be read.

    An answer may be empty, a question at the end have none, and an answer before the first question is dropped, as in the original code.
    `<image>` is text in a record that names no image.

    Raises DataError, naming `source` and the rule, for the first thing wrong with a record.
    """
    if isinstance(item, DataError):
        raise item
    if not isinstance(item, dict):
        raise DataError(f"{source} must have 'conversations' or 'messages', but is {str(item)[:60]}")
    check_media(source, item)
    names = image_names(item)
    if not all(isinstance(name, (str, StoredImage)) and not _is_empty(name) for name in names):
        found = names[0] if len(names) == 1 else names
        raise DataError(f"{source} must have a file name or a list of them as 'image', but has {str(found)[:60]}")
    has_images = bool(names) or any(item.get(key) not in (None, []) for key in IMAGE_KEYS)  # a name may be there, and empty
    system, values = _turns(source, item, has_images)
    if not "".join([system, *values]).isascii():
        check_characters(source, [system, *values])
    number = sum(value.count(IMAGE_TOKEN) for value in values)
    if has_images and number != len(names):
        raise DataError(f"found {number} image tokens in {source} but {len(names)} images")
    places = tuple(images / name if isinstance(name, str) else name for name in names)
    turns = tuple(zip(values[::2], values[1::2], strict=True))
    known = {key for key, *_ in FORMS} | {*IMAGE_KEYS, "system"}
    return Record(source, turns, places, {key: value for key, value in item.items() if key not in known}, system)


def image_names(item: Mapping[str, Any]) -> list[Any]:
    """Return what a record has as images, of its first key that is not empty."""
    names: Any = next((item[key] for key in IMAGE_KEYS if not _is_empty(item.get(key))), [])
    return names if isinstance(names, list) else [names]


def check_media(source: str, item: Mapping[str, Any]) -> None:
    """Raises DataError, naming `source`, if a record has a video or audio, which nothing here reads."""
    for key in MEDIA_KEYS:
        if key in item and not _is_empty(item[key]):
            raise DataError(f"{source} has {str(item[key])[:60]} as {key!r}, but models here read text and images alone")


def _is_empty(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_empty, value))
    return value is None or value != value or (isinstance(value, str) and value.strip().lower() in NO_NAME)


def check_characters(source: str, texts: list[str]) -> None:
    """Raises DataError, naming `source`, if a text holds what no tokenizer can read."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{source} holds half of a character, {text[error.start : error.end]!a}, which is no text") from error


def _turns(source: str, item: dict[str, Any], has_images: bool) -> tuple[str, list[str]]:
    """(system prompt, texts of a record, questions and answers in turn)."""
    for key, (role_key, text_key), roles in FORMS:
        if key not in item:
            continue
        system, turns = split_system(item, item[key], role_key, text_key)
        if not isinstance(system, str) or (has_images and IMAGE_TOKEN in system):
            raise DataError(f"{source} must have a text without {IMAGE_TOKEN} as its system prompt, but has {str(system)[:60]}")
        if not isinstance(turns, list) or len(turns) < 2:
            raise DataError(f"{source} must have {key!r}, a list of {roles[0]} and {roles[1]} turns in pairs, but has {str(turns)[:60]}")
        begin = int(len(turns) > 2 and role_and_text(turns[0], role_key, text_key)[0] == roles[1])
        values = []
        for number, turn in enumerate(turns[begin:]):
            role, text = role_and_text(turn, role_key, text_key)
            place = f"turn {number + begin} of {source}"
            if role != roles[number % 2] or text is None:
                raise DataError(f"{place} must be a text from {roles[number % 2]!r}, but is {str(turn)[:60]}")
            if number % 2 and has_images and IMAGE_TOKEN in text:
                raise DataError(f"{place} is an answer with {IMAGE_TOKEN}, which only human turns may hold")
            if number % 2 == 0:
                _check_media_text(place, text)
            values.append(text)
        return system, values + [""] * (len(values) % 2)
    raise DataError(f"{source} must have 'conversations' or 'messages', but is {str(item)[:60]}")


def _check_media_text(place: str, text: str) -> None:
    found = _MEDIA.search(text) if "<" in text else None
    if found and f"</{found[1].lower()}>" not in text.lower():
        raise DataError(f"{place} has {found[0]}, but models here read text and images alone")


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
