"""Messages and images -> what the model reads, by the conversation form of its processor. Of a user's text nothing becomes an image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from moe_llava.data.rendering import REFUSALS


class FormError(ValueError):
    """Messages that the conversation form has no place for."""


class ConversationForm:
    """For one thread at a time, since its tokenizer is."""

    def __init__(self, processor: Any):
        self._processor = processor
        self._placeholder = re.compile(re.escape(processor.image_token), re.IGNORECASE)
        blank = processor(text=processor.image_token, images=[Image.new("RGB", (8, 8))], add_special_tokens=False, return_tensors="pt")
        self._image_tokens = self._count(blank["input_ids"][0].tolist())
        self.image_bytes = blank["pixel_values"].nbytes  # of an image's pixel values, the same for every one

    def read(self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> tuple[list[int], Tensor | None]:
        """(input ids, pixel values [images, channels, height, width]), up to where the answer to the last message begins, or, if that is an
        answer, to the end. `messages`: as chat templates take them, their texts by `as_text`.

        Raises FormError as `ids` does.
        """
        return self.ids(messages, len(images)), self.pixels(images)

    def ids(self, messages: Sequence[dict[str, Any]], images: int) -> list[int]:
        """The input ids alone, of messages with so many images.

        Raises FormError if the form refuses the messages, or has no place for the images, or a text reads as one.
        """
        token = self._processor.image_token
        try:
            text = self._processor.apply_chat_template(messages, add_generation_prompt=messages[-1]["role"] != "assistant")
        except REFUSALS as error:
            raise FormError(f"the model's conversation form refuses them: {error}") from error
        if text.count(token) != images:
            raise FormError("the model's conversation form has no place for the images")
        ids = self._processor.tokenizer(text.replace(token, token * self._image_tokens), add_special_tokens=False)["input_ids"]
        if self._count(ids) != images * self._image_tokens:
            raise FormError(f"a text reads as {token}, which stands for an image")
        return ids

    def pixels(self, images: Iterable[Image.Image]) -> Tensor | None:
        """The pixel values [images, channels, height, width]; one image at a time, so that an iterator need not hold two."""
        values = list(map(self._values, images))
        return torch.cat(values) if values else None

    def _values(self, image: Image.Image) -> Tensor:
        return self._processor.image_processor([image], return_tensors="pt")["pixel_values"]

    def as_text(self, text: str) -> str:
        """A placeholder that a user wrote gets a space after its first character, and is text."""
        return self._placeholder.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _count(self, ids: list[int]) -> int:
        return ids.count(self._processor.tokenizer.convert_tokens_to_ids(self._processor.image_token))
