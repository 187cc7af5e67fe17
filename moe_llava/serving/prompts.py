"""Messages of a client -> what the model reads. Nothing is fetched here and no file is opened on a client's behalf."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from threading import Lock
from typing import Any, BinaryIO

from PIL import Image
from torch import Tensor

from moe_llava.common.errors import DataError
from moe_llava.common.images import open_image
from moe_llava.serving.form import ConversationForm, FormError
from moe_llava.serving.protocol import ApiError, Limits, Message, TextPart, image_urls, parts_of

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
START_OF_SCAN = b"\xff\xda"
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class SentImage:
    """The bytes of an image; `place` names it in messages."""

    content: bytes
    place: str

    def __str__(self) -> str:
        return self.place

    def open(self) -> BinaryIO:
        return BytesIO(self.content)


class PromptMaker:
    """One request at a time: a tokenizer cannot be used by two threads, and what decoded images take stays bounded."""

    def __init__(self, processor: Any, limits: Limits):
        self._form = ConversationForm(processor)
        self._limits = limits
        self._lock = Lock()

    def make(self, messages: list[Message], fetched: Mapping[str, bytes]) -> tuple[list[int], Tensor | None]:
        """(input ids, pixel values [images, channels, height, width]), up to where the answer to the last message begins, or, if that is an
        answer, to the end. `fetched`: what URLs lead to that hold no image themselves.

        Raises ApiError (400) if an image cannot be taken, or the conversation form has no place for what was said.
        """
        urls = image_urls(messages)
        sent = [SentImage(fetched[url], place) if url in fetched else self._sent(url, place) for url, place in urls]
        conversation = [{"role": message.role, "content": self._parts(message)} for message in messages]
        with self._lock:
            self._check_sizes(sent)
            images = [self._decoded(image) for image in sent]
            try:
                return self._form.read(conversation, images)
            except FormError as error:
                raise ApiError(400, f"messages: {error}", "messages") from error

    def _parts(self, message: Any) -> list[dict[str, str]]:
        """Texts that follow each other become one, with line breaks between them, so that no two of them together make a placeholder."""
        parts: list[dict[str, str]] = []
        for part in parts_of(message.content):
            if isinstance(part, TextPart) and parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += "\n" + part.text
            elif isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
            else:
                parts.append({"type": "image"})
        return [part | {"text": self._form.as_text(part["text"])} if part["type"] == "text" else part for part in parts]

    def _sent(self, url: str, place: str) -> SentImage:
        head = DATA_URL.match(url)
        if head is None:
            raise ApiError(400, f"{place} must be a data: URL, data:image/png;base64,...; nothing is fetched", "messages")
        most = self._limits.image_bytes
        if (len(url) - head.end()) * 3 // 4 > most + 2:
            raise ApiError(400, f"{place} has more than {most} bytes", "messages")
        try:
            return SentImage(base64.b64decode(url[head.end() :], validate=True), place)
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, f"{place} is not base64: {error}", "messages") from error

    def _check_sizes(self, sent: list[SentImage]) -> None:
        """Looks at what images say of themselves, and decodes none."""
        all_pixels, most, most_of_all = 0, self._limits.pixels, self._limits.all_pixels
        for image in sent:
            try:
                with Image.open(image.open(), formats=FORMATS) as header:
                    width, height = header.size
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ApiError(400, f"{image} is none of {', '.join(FORMATS)}, or broken, or too large", "messages") from error
            all_pixels += width * height
            if width * height > most or all_pixels > most_of_all:
                told = f"{image} has {width} x {height} pixels, but at most {most} are taken, and {most_of_all} of all images together"
                raise ApiError(400, told, "messages")
            if header.format in ("JPEG", "MPO") and image.content.count(START_OF_SCAN) > self._limits.scans:
                raise ApiError(400, f"{image} has more than {self._limits.scans} scans", "messages")

    def _decoded(self, sent: SentImage) -> Image.Image:
        try:
            return open_image(sent, "the request", FORMATS)
        except DataError as error:
            raise ApiError(400, str(error), "messages") from error
