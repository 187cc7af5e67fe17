"""Convert records to the inputs of one model, with its own processor, and labels.

The processor decides what an image or a video becomes: how many features, and which tokens stand around and between them (tiles, rows, line
breaks, times). It gets the images or the video alone, and reports the text that replaces each placeholder; `encode.py` puts this text into
the rendered conversation. So nothing here depends on the family. That the ids are those of the processor is checked once for each model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moe_llava.common.errors import DataError
from moe_llava.common.images import ImageSource, open_image
from moe_llava.common.videos import Clip, Video, VideoInfo
from moe_llava.data.answers import check_template, render
from moe_llava.data.encode import IGNORE_INDEX, Encoded, Media, check_rendering, encode_within
from moe_llava.data.records import IMAGE_TOKEN, PART_TYPES, VIDEO_TOKEN, Record
from moe_llava.data.rendering import REFUSALS, check_prompt
from moe_llava.data.videos import VideoReader

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # inputs with a type for each token; a model has one of them or none
EXPERT_TYPES = "moe_mm_token_type_ids"  # a type besides: 0 for tokens of a family's text experts, others for those of its image experts
TEXT_INPUTS = ("input_ids", "attention_mask", *TOKEN_TYPES, EXPERT_TYPES, "text_replacement_offsets", "labels")
# Width and height. Processors with tiles or dynamic resolution make different numbers of tokens of them.
_SIZES = ((224, 224), (640, 480), (300, 1200), (1280, 720), (64, 40))
_SAMPLE = 16  # images, and videos, whose tokens are counted for an estimate
_CLIP = VideoInfo(frames=4, fps=1.0, width=64, height=48)  # of a test conversation


class Encoder:
    """Convert records to model inputs and labels for `processor`.

    `template`: a chat template, a key of TEMPLATES; None for the processor's own. Records are cut after `max_length` tokens.

    Raises DataError if the tokenizer has no pad token, if answers cannot be found in the chat template, or if the processor does not report
    what replaces an image.
    """

    def __init__(self, processor: Any, template: str | None = None, max_length: int | None = None):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.template, self.max_length = template, max_length
        if self.tokenizer.pad_token_id is None:
            raise DataError("the tokenizer has no pad token, which batches are padded with")
        check_template(self.tokenizer, template)

    def __call__(self, record: Record) -> dict[str, Tensor]:
        """Return `input_ids` and `labels` [S], for some models a type of each token [S], and the processor's inputs of the images or the
        video.

        Raises DataError, naming the record, if an image or a video cannot be read, or as `encode_within` does.
        """
        if record.video is not None:
            inputs, texts = self._process_video_of(record.video, record.source)
        else:
            images = [open_image(path, record.source) for path in record.images]
            try:
                inputs, texts = self.process(images)
            except DataError as error:
                raise DataError(f"{record.source}: {error}") from error
        encoded, _ = self._encode(record, texts, self.max_length)
        return self._as_tensors(encoded) | inputs

    def measure(self, record: Record, sizes: Sequence[tuple[int, int]]) -> tuple[Encoded, bool]:
        """Return (ids and labels of a record whose images have these sizes, whether it was cut). A video is decoded. Raises DataError as
        the encoder does."""
        texts = [self._text_of(size) for size in sizes] if record.video is None else [self._video_text(record.video, record.source)]
        return self._encode(record, texts, self.max_length)

    def check_rendering(self, record: Record) -> None:
        """Raise DataError, naming the record, if the chat template refuses it, or if it has a video and the model takes none. Nothing is
        tokenized."""
        if record.video is not None:
            self._check_video(record.source)
        check_rendering(record, self.tokenizer, self.template, self._image)

    def process(self, images: Sequence[Image.Image]) -> tuple[dict[str, Tensor], list[str]]:
        """Return (the model's inputs of `images`, the text that replaces each image's placeholder)."""
        return self._process(self.processor.image_token * len(images), "an image", images=[list(images)]) if images else ({}, [])

    def open_video(self, video: Video, source: str) -> Clip:
        """Return the frames of a video that the model sees. Raises DataError, naming `source`, if it cannot be read, or if the model takes
        no videos."""
        self._check_video(source)
        return self._reader.open(video, source)

    def inspect_video(self, file: Path | ImageSource, source: str) -> tuple[VideoInfo, list[int]]:
        """Return (what a video file says of itself, the indices of the frames that the model sees); none is decoded. Raises DataError as
        `open_video` does."""
        self._check_video(source)
        return self._reader.inspect(file, source)

    def process_video(self, clip: Clip) -> tuple[dict[str, Tensor], list[str]]:
        """Return (the model's inputs of a video, the text that replaces its placeholder, in a list)."""
        return self._process(self.processor.video_token, "a video", **self._reader.arguments(clip))

    def _process(self, text: str, medium: str, **media: Any) -> tuple[dict[str, Tensor], list[str]]:
        """Return (the model's inputs of `media`, the text that replaces each placeholder in `text`)."""
        name = type(self.processor).__name__
        try:
            found = self.processor(text=[text], **media, return_text_replacement_offsets=True, return_tensors="pt")
        except ValueError as error:
            raise DataError(f"the model's {name} refuses {medium}: {error}") from error
        replaced = found.get("text_replacement_offsets")
        if not replaced:
            raise DataError(f"the model's {name} does not report what replaces {medium} in a text")
        return {name: value for name, value in found.items() if name not in TEXT_INPUTS}, [each["replacement"] for each in replaced[0]]

    def _process_video_of(self, video: Video, source: str) -> tuple[dict[str, Tensor], list[str]]:
        clip = self.open_video(video, source)
        try:
            return self.process_video(clip)
        except DataError as error:
            raise DataError(f"{source}: {error}") from error

    def check_processor(self) -> None:
        """Raise DataError unless the processor's chat template can render a question about an image, and the encoder's ids and inputs of a
        conversation equal those of the processor."""
        check_prompt(self.tokenizer, self.processor.image_token)
        if self.template is None:
            image = Image.new("RGB", _SIZES[1])
            record = Record("a test conversation", ((f"{IMAGE_TOKEN}\nx", "y"),), (Path(),))
            self._compare(record, self.process([image]), images=[[image]])

    @cached_property
    def video_problem(self) -> str:
        """Return why records with a video cannot be encoded for the model, checked as `check_processor` does; "" if they can be."""
        if getattr(self.processor, "video_processor", None) is None or getattr(self.processor, "video_token", None) is None:
            return f"the model's {type(self.processor).__name__} takes no videos"
        clip = Clip(np.zeros((_CLIP.frames, _CLIP.height, _CLIP.width, 3), np.uint8), list(range(_CLIP.frames)), _CLIP)
        try:
            check_prompt(self.tokenizer, self.processor.video_token, PART_TYPES[VIDEO_TOKEN])
            if self.template is None:
                record = Record("a test conversation", ((f"{VIDEO_TOKEN}\nx", "y"),), video=Path())
                self._compare(record, self.process_video(clip), **self._reader.arguments(clip))
        except DataError as error:
            return str(error)
        except (*REFUSALS, RuntimeError, ArithmeticError, ImportError) as error:
            return f"the model's {type(self.processor).__name__} fails on one: {error}"
        return ""

    def _check_video(self, source: str) -> None:
        if self.video_problem:
            raise DataError(f"{source} has a video, but {self.video_problem}")

    def _compare(self, record: Record, processed: tuple[dict[str, Tensor], list[str]], **media: Any) -> None:
        """Raise DataError unless the ids and inputs of a record with one turn equal those that the processor makes of it and `media`."""
        inputs, texts = processed
        ours = self._as_tensors(self._encode(record, texts, None)[0]) | inputs
        ((question, answer),) = record.turns
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text, _ = render(messages, self.tokenizer, None, self._image, record.token or IMAGE_TOKEN)
        theirs = self.processor(text=[text], **media, add_special_tokens=False, return_tensors="pt")
        names = theirs.keys() - {"attention_mask"}
        wrong = sorted(names ^ (ours.keys() - {"labels"})) or [
            name for name in ("input_ids", *TOKEN_TYPES, EXPERT_TYPES) if name in names and not torch.equal(ours[name], theirs[name][0])
        ]
        if wrong:
            raise DataError(
                f"the model's {type(self.processor).__name__} makes other {', '.join(wrong)} of a conversation than its chat template and "
                "its tokenizer do: records cannot be encoded for it"
            )

    @cached_property
    def image_tokens(self) -> int | None:
        """The number of tokens of an image, if it is the same for images of all sizes."""
        numbers = {self._tokens_of(size) for size in _SIZES}
        return numbers.pop() if len(numbers) == 1 else None

    def estimate_image_tokens(self, records: Sequence[Record]) -> int:
        """Return the median number of tokens of the first images of `records`."""
        if self.image_tokens is not None:
            return self.image_tokens
        numbers: list[int] = []
        for record in records:
            for path in record.images if len(numbers) < _SAMPLE else ():
                try:
                    numbers.append(self._tokens_of(open_image(path, record.source).size))
                except DataError:
                    continue  # reported when the record is read
            if len(numbers) >= _SAMPLE:
                break
        return round(median(numbers)) if numbers else 0

    def estimate_video_tokens(self, records: Sequence[Record]) -> int:
        """Return the median number of tokens of the first videos of `records`, which all have one."""
        numbers: list[int] = []
        for record in records[:_SAMPLE]:
            assert record.video is not None
            with suppress(DataError):  # reported when the record is read
                numbers.append(self._count(self._video_text(record.video, record.source)))
        return round(median(numbers)) if numbers else 0

    def nothing(self) -> dict[str, Tensor]:
        """Return an item of one padding token without a label."""
        return self._as_tensors({"input_ids": [self.tokenizer.pad_token_id], "labels": [IGNORE_INDEX]})

    def empty_image(self) -> dict[str, Tensor]:
        """Return an item that holds one small image and no text."""
        inputs, (text,) = self.process([Image.new("RGB", _SIZES[0])])
        return self._as_tensors({"input_ids": self.tokenizer(text, add_special_tokens=False)["input_ids"]}) | inputs

    def _encode(self, record: Record, texts: list[str], max_length: int | None) -> tuple[Encoded, bool]:
        token = record.token or IMAGE_TOKEN
        placeholder = token if self.template is not None else self._image if token == IMAGE_TOKEN else self.processor.video_token
        media = Media(token, self._image, placeholder, texts, self.reserved)
        return encode_within(record, self.tokenizer, self.template, media, max_length)

    def _as_tensors(self, encoded: Encoded) -> dict[str, Tensor]:
        return {name: torch.tensor(values) for name, values in encoded.items()} | self.token_types(encoded["input_ids"])

    def token_types(self, ids: list[int]) -> dict[str, Tensor]:
        """Return the types of each token [S] under the names of the model's inputs; nothing for a model without types."""
        if not self.processor.return_mm_token_type_ids:
            return {}
        name = next(name for name in TOKEN_TYPES if name in self.processor.model_input_names)
        types = {name: torch.tensor(self.processor.create_mm_token_type_ids([ids])[0])}
        if EXPERT_TYPES in self.processor.model_input_names:
            types[EXPERT_TYPES] = torch.tensor(self.processor.create_moe_mm_token_type_ids([ids])[0])
        return types

    @property
    def _image(self) -> str:
        """Return what the chat template renders for an image."""
        return self.processor.image_token if self.template is None else IMAGE_TOKEN

    @cached_property
    def _reader(self) -> VideoReader:
        return VideoReader(self.processor)

    @cached_property
    def reserved(self) -> tuple[str, ...]:
        """The tokens that stand for images and videos, and those that the processor puts around them. In a record they are text, but for
        those that the chat template itself writes."""
        image = self._text_of(_SIZES[0])
        rendered, _ = render([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], self.tokenizer, self.template)
        special = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        found = {token for token in special if token in image and token not in rendered}
        return tuple(sorted({IMAGE_TOKEN, self.processor.image_token, getattr(self.processor, "video_token", None) or IMAGE_TOKEN} | found))

    @lru_cache(maxsize=4096)  # noqa: B019 (an encoder lives as long as its stage)
    def _text_of(self, size: tuple[int, int]) -> str:
        """Return the text that replaces an image of `size`, on which alone it depends."""
        return self.process([Image.new("RGB", size)])[1][0]

    def _video_text(self, video: Video, source: str) -> str:
        """Return the text that replaces a video, which is decoded."""
        return self._process_video_of(video, source)[1][0]

    def _tokens_of(self, size: tuple[int, int]) -> int:
        return self._count(self._text_of(size))

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
