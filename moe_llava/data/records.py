"""One conversation, and the rules for it. A record follows one of two schemas:

{"id": "7", "image": "7.png", "conversations": [{"from": "human", "value": "<image>\\nWhere?"}, {"from": "gpt", "value": "here"}]}
{"id": "7", "images": ["7.png"], "messages": [{"role": "user", "content": "<image>\\nWhere?"}, {"role": "assistant", "content": "here"}]}

In the second, content may also be a list of parts: {"type": "image"} and {"type": "text", "text": "Where?"}.

Instead of images a record may have one video, as `"video": "7.mp4"` or as a list of its frames, `"video": ["7-0.png", "7-1.png"]`, and one
`<video>` in a question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_llava.common.errors import DataError
from moe_llava.common.images import InlineImage
from moe_llava.common.videos import Video
from moe_llava.data.files import IMAGE_KEYS, StoredImage

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
PART_TYPES = {IMAGE_TOKEN: "image", VIDEO_TOKEN: "video"}  # of a placeholder in a message's content
VIDEO_KEY = "video"
MEDIA_KEYS = ("videos", "video_path", "audio", "audios", "audio_path", "speech")  # not read
NO_NAME = ("", "none", "null", "nan")  # stand for a missing file name in tables that were converted to JSON
# A placeholder of a medium other than images. With its end tag, or in backquotes, it is HTML that the text is about.
_MEDIA = re.compile(r"(?<!`)<(video|audio|speech)>(?!`)", re.IGNORECASE)
# key of the turns, (key of a turn's role, of its text), the roles
SCHEMAS = (
    ("conversations", ("from", "value"), ("human", "gpt")),
    ("messages", ("role", "content"), ("user", "assistant")),
)


@dataclass(frozen=True)
class Record:
    """One conversation.

    `source`: file and record, for messages. `turns`: (question, answer). `extra`: the keys that are not LLaVA's own. `system`: the system
    prompt, empty for that of the chat template. `video`: a file, or the files of its frames; a record with a video has no images.
    """

    source: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[Path | StoredImage | InlineImage, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    video: Video | None = None

    @property
    def token(self) -> str | None:
        """The placeholder of the record's images or of its video; None for text alone, in which both are text."""
        return VIDEO_TOKEN if self.video is not None else IMAGE_TOKEN if self.images else None

    @property
    def files(self) -> list[Path]:
        """The files of the record's images, or of its video."""
        video = self.video if isinstance(self.video, tuple) else () if self.video is None else (self.video,)
        return [file for file in (*self.images, *video) if isinstance(file, Path)]

    def group(self, key: str) -> str:
        """Return the value of a key that is not LLaVA's own, as text. Raises DataError if the record has no text or number there."""
        if key not in self.extra:
            raise DataError(f"{self.source} has no {key!r} to group it by, only {', '.join(self.extra) or 'its conversation'}")
        if not isinstance(self.extra[key], str | int | float):
            raise DataError(
                f"{self.source} has {str(self.extra[key])[:60]} as {key!r}, but must have a text or a number there to group it by"
            )
        return str(self.extra[key])

    def messages(self) -> list[dict[str, Any]]:
        """Return the conversation as transformers' chat templates take it."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        for question, answer in self.turns:
            messages.append({"role": "user", "content": content_parts(question, self.token)})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return messages


def content_parts(text: str, token: str | None = IMAGE_TOKEN) -> list[dict[str, str]]:
    """Split a question at its placeholders `token`. Without a token it is one part, unchanged."""
    if token is None:
        return [{"type": "text", "text": text}]
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(token)):
        if index:
            parts.append({"type": PART_TYPES[token]})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def parse_record(source: str, item: Any, images: Path) -> Record:
    """Return the Record of an item of `read_items`. Names of images and videos are relative to `images`; whether the files exist is not
    checked.

    As in the original code, an answer may be empty, the last question may have no answer, and an answer before the first question is
    dropped. `<image>` is text in a record that names no image.

    Raises DataError, naming `source` and the rule, for the first rule that the record breaks, or if `item` is a DataError.
    """
    if isinstance(item, DataError):
        raise item
    if not isinstance(item, dict):
        raise DataError(f"{source} must have 'conversations' or 'messages', but is {str(item)[:60]}")
    check_media(source, item)
    names = image_names(item)
    if not all(isinstance(name, (str, StoredImage, InlineImage)) and not _is_empty(name) for name in names):
        found = names[0] if len(names) == 1 else names
        raise DataError(f"{source} must have a file name or a list of them as 'image', but has {str(found)[:60]}")
    has_images = bool(names) or any(item.get(key) not in (None, []) for key in IMAGE_KEYS)  # an empty name counts here
    video = _video_of(source, item, images)
    if video is not None and names:
        raise DataError(f"{source} has images and a video, {str(item[VIDEO_KEY])[:60]}, but must have only one of both")
    system, values = _parse_turns(source, item, VIDEO_TOKEN if video is not None else IMAGE_TOKEN if has_images else None)
    if not "".join([system, *values]).isascii():
        check_characters(source, [system, *values])
    number = sum(value.count(IMAGE_TOKEN) for value in values)
    if video is None and has_images and number != len(names):
        raise DataError(f"found {number} image tokens in {source} but {len(names)} images")
    videos = sum(value.count(VIDEO_TOKEN) for value in values)
    if video is not None and videos != 1:
        raise DataError(f"found {videos} {VIDEO_TOKEN} in the questions of {source}, which has a video, but must find one")
    turns = tuple(zip(values[::2], values[1::2], strict=True))
    files = tuple(images / name if isinstance(name, str) else name for name in names)
    known = {key for key, *_ in SCHEMAS} | {*IMAGE_KEYS, VIDEO_KEY, "system"}
    return Record(source, turns, files, {key: value for key, value in item.items() if key not in known}, system, video)


def without_image(source: str) -> DataError:
    return DataError(f"{source} has no image, but stage I trains the projector, which sees nothing else")


def has_video(item: Mapping[str, Any]) -> bool:
    return not _is_empty(item.get(VIDEO_KEY))


def _video_of(source: str, item: Mapping[str, Any], folder: Path) -> Video | None:
    """Return the video of a record: a file, or the files of its frames."""
    if not has_video(item):
        return None
    value = item[VIDEO_KEY]
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and not _is_empty(name) for name in names):
        raise DataError(f"{source} must have a file name or a list of the file names of its frames as 'video', but has {str(value)[:60]}")
    return tuple(folder / name for name in names) if isinstance(value, list) else folder / names[0]


def image_names(item: Mapping[str, Any]) -> list[Any]:
    """Return the images under the first image key of a record that is not empty."""
    names: Any = next((item[key] for key in IMAGE_KEYS if not _is_empty(item.get(key))), [])
    return names if isinstance(names, list) else [names]


def check_media(source: str, item: Mapping[str, Any]) -> None:
    """Raise DataError, naming `source`, if a record has audio, or a video under another key than `video`."""
    for key in MEDIA_KEYS:
        if key in item and not _is_empty(item[key]):
            rule = "but a record has one video, as 'video'" if "video" in key else "but models here read no audio"
            raise DataError(f"{source} has {str(item[key])[:60]} as {key!r}, {rule}")


def _is_empty(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_empty, value))
    return value is None or value != value or (isinstance(value, str) and value.strip().lower() in NO_NAME)  # NaN is not itself


def check_characters(source: str, texts: list[str]) -> None:
    """Raise DataError, naming `source`, if a text holds half a surrogate pair, which no tokenizer takes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{source} holds half of a character, {text[error.start : error.end]!a}, which is no text") from error


def _parse_turns(source: str, item: dict[str, Any], token: str | None) -> tuple[str, list[str]]:
    """Return (system prompt, texts of questions and answers in turn) of a record, whose placeholder is `token`."""
    for key, (role_key, text_key), roles in SCHEMAS:
        if key not in item:
            continue
        system, turns = split_system(item, item[key], role_key, text_key)
        if not isinstance(system, str) or (token and token in system):
            without = token or IMAGE_TOKEN
            raise DataError(f"{source} must have a text without {without} as its system prompt, but has {str(system)[:60]}")
        if not isinstance(turns, list) or len(turns) < 2:
            raise DataError(f"{source} must have {key!r}, a list of {roles[0]} and {roles[1]} turns in pairs, but has {str(turns)[:60]}")
        begin = int(len(turns) > 2 and role_and_text(turns[0], role_key, text_key)[0] == roles[1])
        values = []
        for number, turn in enumerate(turns[begin:]):
            role, text = role_and_text(turn, role_key, text_key)
            name = f"turn {number + begin} of {source}"
            if role != roles[number % 2] or text is None:
                raise DataError(f"{name} must be a text from {roles[number % 2]!r}, but is {str(turn)[:60]}")
            if number % 2 and token and token in text:
                raise DataError(f"{name} is an answer with {token}, which only human turns may hold")
            if number % 2 == 0 and "<" in text:
                _check_placeholders(name, text, token)
            values.append(text)
        return system, values + [""] * (len(values) % 2)
    raise DataError(f"{source} must have 'conversations' or 'messages', but is {str(item)[:60]}")


def _check_placeholders(name: str, text: str, token: str | None) -> None:
    """Raise DataError, naming the turn `name`, if a question has a placeholder of a medium that its record does not have. `token`: that of
    the record's own."""
    for found in _MEDIA.finditer(text):
        if found[0] != token and f"</{found[1].lower()}>" not in text.lower():
            rule = "but its record has no 'video'" if found[1].lower() == "video" else "but models here read no audio"
            raise DataError(f"{name} has {found[0]}, {rule}")


def split_system(item: Any, turns: Any, role_key: str, text_key: str) -> tuple[Any, Any]:
    """Return (system prompt, other turns) of a record. The system prompt is the first turn, or the key `system`."""
    if isinstance(turns, list) and turns:
        role, text = role_and_text(turns[0], role_key, text_key)
        if role == "system":
            return text, turns[1:]
    return item.get("system") or "", turns


def role_and_text(turn: Any, role_key: str, text_key: str) -> tuple[Any, str | None]:
    """Return the role and the text of a turn, each None if it is missing."""
    return (turn.get(role_key), _text_of(turn.get(text_key))) if isinstance(turn, dict) else (None, None)


def _text_of(content: Any) -> str | None:
    """Return the text of a turn's content, a string or parts, which are put on lines of their own; None for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = next((token for token, part_type in PART_TYPES.items() if kind == part_type), part.get("text") if kind == "text" else None)
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "\n".join(texts)
