"""Messages of a client -> what the model reads. Nothing is fetched and no file is opened on a client's behalf."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from io import BytesIO
from threading import Lock
from typing import Any, BinaryIO

from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from moe_llava.data.records import DataError, open_image
from moe_llava.serving.protocol import ApiError, ImagePart, Limits, Message, TextPart, parts_of

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
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
        self._processor = processor
        self._limits = limits
        self._lock = Lock()
        self._placeholder = re.compile(re.escape(processor.image_token), re.IGNORECASE)
        blank = self._inputs(processor.image_token, [Image.new("RGB", (8, 8))])
        self._image_tokens = self._count(blank["input_ids"][0].tolist())

    def make(self, messages: list[Message]) -> tuple[list[int], Tensor | None]:
        """(input ids, pixel values [images, channels, height, width]), up to where the answer to the last message begins, or, if that is an
        answer, to the end.

        Raises ApiError (400) if an image cannot be taken, or the conversation form has no place for what was said.
        """
        urls = [part.image_url.url for message in messages for part in parts_of(message.content) if isinstance(part, ImagePart)]
        sent = [self._sent(url, f"image {number}") for number, url in enumerate(urls)]
        conversation = [{"role": message.role, "content": self._parts(message)} for message in messages]
        with self._lock:
            images = [self._decoded(image) for image in sent]
            try:
                text = self._processor.apply_chat_template(conversation, add_generation_prompt=messages[-1].role == "user")
            except TemplateError as error:
                raise ApiError(400, f"messages: the model's conversation form refuses them: {error}", "messages") from error
            if text.count(self._processor.image_token) != len(images):
                raise ApiError(400, "messages: the model's conversation form has no place for the images", "messages")
            inputs = self._inputs(text, images)
        ids = inputs["input_ids"][0].tolist()
        if self._count(ids) != len(images) * self._image_tokens:
            raise ApiError(400, f"messages: a text reads as {self._processor.image_token}, which stands for an image", "messages")
        return ids, inputs.get("pixel_values")

    def _inputs(self, text: str, images: list[Image.Image]) -> Any:
        return self._processor(text=text, images=images or None, add_special_tokens=False, return_tensors="pt")

    def _count(self, ids: list[int]) -> int:
        return ids.count(self._processor.tokenizer.convert_tokens_to_ids(self._processor.image_token))

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
        return [part | {"text": self._as_text(part["text"])} if part["type"] == "text" else part for part in parts]

    def _as_text(self, text: str) -> str:
        """A placeholder that a client wrote gets a space after its first character, and is text."""
        return self._placeholder.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

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

    def _decoded(self, sent: SentImage) -> Image.Image:
        try:
            with Image.open(sent.open(), formats=FORMATS) as header:  # reads no pixel
                width, height = header.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ApiError(400, f"{sent} is none of {', '.join(FORMATS)}, or broken, or too large", "messages") from error
        if width * height > self._limits.pixels:
            raise ApiError(400, f"{sent} has {width} x {height} pixels, but at most {self._limits.pixels} are taken", "messages")
        try:
            return open_image(sent, "the request")
        except DataError as error:
            raise ApiError(400, str(error), "messages") from error
