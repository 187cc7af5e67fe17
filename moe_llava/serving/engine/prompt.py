"""Convert messages, images and videos to a prompt, with the chat template of the model's processor. No text of a user becomes an image or
a video."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import ProcessorMixin

from moe_llava.common.errors import DataError
from moe_llava.common.images import ImageSource
from moe_llava.common.videos import Clip, Video, VideoInfo
from moe_llava.data.batches import concatenated
from moe_llava.data.encoder import Encoder
from moe_llava.data.records import PART_TYPES
from moe_llava.data.rendering import REFUSALS, own_template
from moe_llava.serving.engine.prefixes import media_digest
from moe_llava.serving.engine.requests import Prompt

_LARGE, _SMALL = (1024, 1024), ((512, 384), (256, 640))  # width and height
_FRAMES = 4


class PromptError(ValueError):
    """The chat template or the processor refuses the messages."""


class PromptBuilder:
    """Build prompts for the model of `processor`. Only one thread may use it at a time, because its tokenizer is not thread-safe."""

    def __init__(self, processor: ProcessorMixin):
        self._processor = processor
        self._encoder = Encoder(processor)
        self._placeholder = re.compile("|".join(map(re.escape, self._encoder.reserved)), re.IGNORECASE)

    def unknown_words(self, text: str) -> list[str]:
        """Return the words for which the tokenizer has nothing but its unknown token."""
        tokenizer = self._processor.tokenizer
        words = dict.fromkeys(re.findall(r"\w+", text)) if tokenizer.unk_token_id is not None else {}
        return [word for word in words if tokenizer(word, add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]]

    def inspect_video(self, file: ImageSource, source: str) -> tuple[VideoInfo, list[int]]:
        """Return (what a video file says of itself, the indices of the frames that the model sees); none is decoded. Raises DataError as
        `open_video` does."""
        return self._encoder.inspect_video(file, source)

    def image_bytes(self) -> Callable[[tuple[int, int]], int]:
        """Return a function from the size of an image, width and height, to the bytes of its inputs; no image is made for it.

        Inputs grow with the number of tokens, which is measured with two images here: with patches in proportion; with tiles, which are not
        all seen, by an estimate that is at least what a large image needs.
        """
        (large, small), tokens = (self._bytes_of(size) for size in (_LARGE, _SMALL[0])), self._tokens_of(_LARGE)
        proportional = abs(small * tokens / (large * self._tokens_of(_SMALL[0])) - 1) < 0.02

        def of(size: tuple[int, int]) -> int:
            share = self._tokens_of(size) / tokens
            return math.ceil(large * (share if proportional else max(1.0, share)))

        return of

    def _bytes_of(self, size: tuple[int, int]) -> int:
        inputs, _ = self._encoder.process([Image.new("RGB", size)])
        return sum(tensor.nbytes for tensor in inputs.values())

    def _tokens_of(self, size: tuple[int, int]) -> int:
        """Return the number of tokens of an image of `size` as the processor tells it to engines such as vLLM, 1 if it does not."""
        count = getattr(self._processor, "_get_num_multimodal_tokens", None)
        return 1 if count is None else count(image_sizes=[(size[1], size[0])])["num_image_tokens"][0]

    def frame_bytes(self) -> int | None:
        """Return the size of a frame's inputs, if the model takes videos, and if it is the same for frames of all sizes."""
        if self._encoder.video_problem:
            return None
        sizes = set()
        for width, height in _SMALL:
            info = VideoInfo(_FRAMES, 1.0, width, height)
            frames = np.zeros((_FRAMES, height, width, 3), np.uint8)
            inputs, _ = self._encoder.process_video(Clip(frames, list(range(_FRAMES)), info))
            sizes.add(-(-sum(tensor.nbytes for tensor in inputs.values()) // _FRAMES))
        return sizes.pop() if len(sizes) == 1 else None

    def open_video(self, video: Video, source: str) -> Clip:
        """Return the frames of a video that the model sees. Raises DataError, naming `source`, if it cannot be read, or if the model takes
        no videos."""
        return self._encoder.open_video(video, source)

    def build(self, messages: Sequence[dict[str, Any]], media: Iterable[Image.Image | Clip]) -> Prompt:
        """Return the prompt of `messages` with the images and videos of their parts, in order, up to the beginning of the next answer or,
        if the last message is an answer, to its end. An iterator of media is consumed one by one, so it need not hold two at once, and not
        before the messages are checked.

        `messages`: as chat templates take them, with texts from `escape`.

        Raises PromptError if the chat template refuses the messages or does not render all images and videos, if the model takes no videos,
        or if a text contains a placeholder.
        """
        text, kinds = self._rendered(messages)
        if any(self._placeholder.search(part["text"]) for message in messages for part in message["content"] if part["type"] == "text"):
            raise PromptError("a text contains a placeholder, which is reserved for images")
        inputs, texts = [], dict[str, list[str]]()  # the texts of each kind in turn: a template may render one kind first
        try:
            for medium in media:
                made, replaced = self._encoder.process_video(medium) if isinstance(medium, Clip) else self._encoder.process([medium])
                inputs.append(made)
                texts.setdefault("video" if isinstance(medium, Clip) else "image", []).extend(replaced)
        except DataError as error:
            raise PromptError(str(error)) from error
        if kinds:
            text = re.sub("|".join(map(re.escape, kinds)), lambda found: texts[kinds[found[0]]].pop(0), text)
        ids = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        images = concatenated(inputs)
        types = {name: types[None] for name, types in self._encoder.token_types(ids).items()}
        return Prompt(ids, images | types, media_digest(images))

    def _rendered(self, messages: Sequence[dict[str, Any]]) -> tuple[str, dict[str, str]]:
        """Return (the text of the messages, placeholder -> kind of the media in it)."""
        wanted = [part["type"] for message in messages for part in message["content"] if part["type"] != "text"]
        if "video" in wanted and self._encoder.video_problem:
            raise PromptError(self._encoder.video_problem)
        try:
            text = self._processor.apply_chat_template(
                messages, own_template(self._processor), add_generation_prompt=messages[-1]["role"] != "assistant"
            )
        except REFUSALS as error:
            raise PromptError(f"the model's chat template refuses them: {error}") from error
        tokens = {getattr(self._processor, f"{kind}_token", None) or "": kind for kind in PART_TYPES.values()}
        kinds = {token: kind for token, kind in tokens.items() if token}
        for token, kind in kinds.items():
            if text.count(token) != wanted.count(kind):
                raise PromptError(f"the model's chat template does not render the {kind}s")
        return text, {token: kind for token, kind in kinds.items() if kind in wanted}

    def escape(self, text: str) -> str:
        """Insert a space after the first character of every placeholder in `text`, so that it is tokenized as text."""
        return self._placeholder.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
