"""Convert messages and images to a prompt, with the chat template of the model's processor. No text of a user becomes an image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from moe_llava.common.errors import DataError
from moe_llava.data.batches import concatenated
from moe_llava.data.encoder import Encoder
from moe_llava.data.rendering import REFUSALS
from moe_llava.serving.engine.requests import Prompt

_LARGE = (1024, 1024)  # width and height


class PromptError(ValueError):
    """The chat template or the processor refuses the messages."""


class PromptBuilder:
    """Build prompts for the model of `processor`. Only one thread may use it at a time, because its tokenizer is not thread-safe.

    `image_bytes`: the size of the inputs of a large image.
    """

    def __init__(self, processor: ProcessorMixin):
        self._processor = processor
        self._encoder = Encoder(processor)
        self._placeholder = re.compile("|".join(map(re.escape, self._encoder.reserved)), re.IGNORECASE)
        large, _ = self._encoder.process([Image.new("RGB", _LARGE)])
        self.image_bytes = sum(tensor.nbytes for tensor in large.values())

    def build(self, messages: Sequence[dict[str, Any]], images: Iterable[Image.Image], count: int) -> Prompt:
        """Return the prompt of `messages` with `count` images, up to the beginning of the next answer or, if the last message is an answer,
        to its end. An iterator of images is consumed one by one, so it need not hold two at once, and not before the messages are checked.

        `messages`: as chat templates take them, with texts from `escape`.

        Raises PromptError if the chat template refuses the messages or does not render all images, or if a text contains a placeholder.
        """
        token = self._processor.image_token
        try:
            text = self._processor.apply_chat_template(messages, add_generation_prompt=messages[-1]["role"] != "assistant")
        except REFUSALS as error:
            raise PromptError(f"the model's chat template refuses them: {error}") from error
        if text.count(token) != count:
            raise PromptError("the model's chat template does not render the images")
        if any(self._placeholder.search(part["text"]) for message in messages for part in message["content"] if part["type"] == "text"):
            raise PromptError("a text contains a placeholder, which is reserved for images")
        try:
            processed = [self._encoder.process([image]) for image in images]
        except DataError as error:
            raise PromptError(str(error)) from error
        pieces = text.split(token)
        text = pieces[0] + "".join(replaced[0] + piece for (_, replaced), piece in zip(processed, pieces[1:], strict=True))
        ids = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        inputs = concatenated([found for found, _ in processed])
        return Prompt(ids, inputs | {name: types[None] for name, types in self._encoder.token_types(ids).items()})

    def escape(self, text: str) -> str:
        """Insert a space after the first character of every placeholder in `text`, so that it is tokenized as text."""
        return self._placeholder.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
