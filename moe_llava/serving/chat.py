"""A conversation with a model about images, answered piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

from PIL import Image
from transformers import TextIteratorStreamer

from moe_llava.data.records import open_image


@dataclass
class Conversation:
    """The turns so far. An image belongs to the next question that is asked."""

    model: Any
    processor: Any
    max_new_tokens: int = 256
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    waiting: int = 0  # images added since the last question

    def add_image(self, path: Path) -> None:
        """Raises DataError if the file is missing or no image."""
        self.images.append(open_image(path, "the conversation"))
        self.waiting += 1

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer piece by piece, and then keeps it as a turn. Greedy.

        Raises ValueError if `question` is empty.
        """
        if not question.strip():
            raise ValueError("the prompt is empty: ask something")
        content: list[dict[str, str]] = [{"type": "image"}] * self.waiting + [{"type": "text", "text": question.strip()}]
        messages = [*self.messages, {"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(text=prompt, images=self.images or None, add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[Exception] = []
        thread = Thread(target=self._generate, args=({**inputs, "streamer": streamer}, failures), daemon=True)
        thread.start()
        answer = ""
        for piece in streamer:
            answer += piece
            yield piece
        thread.join()
        if failures:
            raise failures[0]
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]}]
        self.waiting = 0

    def _generate(self, inputs: dict[str, Any], failures: list[Exception]) -> None:
        """Runs beside `ask`, which raises here what goes wrong there."""
        try:
            self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        except Exception as error:  # noqa: BLE001  `ask` raises it
            failures.append(error)
            inputs["streamer"].end()
