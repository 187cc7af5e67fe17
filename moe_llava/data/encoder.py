"""Convert records to the inputs of one model, with its own processor, and labels.

The processor decides what an image becomes: how many features, and which tokens stand around and between them (tiles, rows, line breaks).
It gets the images alone, and reports the text that replaces each placeholder; `encode.py` puts this text into the rendered conversation.
So nothing here depends on the family. That the ids are those of the processor is checked once for each model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from moe_llava.common.errors import DataError
from moe_llava.common.images import open_image
from moe_llava.data.answers import check_template, render
from moe_llava.data.encode import IGNORE_INDEX, Encoded, Images, check_rendering, encode_within
from moe_llava.data.records import IMAGE_TOKEN, Record
from moe_llava.data.rendering import check_prompt

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # inputs with a type for each token; a model has one of them or none
EXPERT_TYPES = "moe_mm_token_type_ids"  # a type besides: 0 for tokens of a family's text experts, others for those of its image experts
TEXT_INPUTS = ("input_ids", "attention_mask", *TOKEN_TYPES, EXPERT_TYPES, "text_replacement_offsets", "labels")
# Width and height. Processors with tiles or dynamic resolution make different numbers of tokens of them.
_SIZES = ((224, 224), (640, 480), (300, 1200), (1280, 720), (64, 40))
_SAMPLE = 16  # images whose tokens are counted for an estimate


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
        """Return `input_ids` and `labels` [S], for some models a type of each token [S], and the processor's inputs of the images.

        Raises DataError, naming the record, if an image cannot be read, or as `encode_within` does.
        """
        images = [open_image(path, record.source) for path in record.images]
        try:
            inputs, texts = self.process(images)
        except DataError as error:
            raise DataError(f"{record.source}: {error}") from error
        encoded, _ = self._encode(record, texts, self.max_length)
        return self._as_tensors(encoded) | inputs

    def measure(self, record: Record, sizes: Sequence[tuple[int, int]]) -> tuple[Encoded, bool]:
        """Return (ids and labels of a record whose images have these sizes, whether it was cut). Raises DataError as the encoder does."""
        return self._encode(record, [self._text_of(size) for size in sizes], self.max_length)

    def check_rendering(self, record: Record) -> None:
        """Raise DataError, naming the record, if the chat template refuses it. Nothing is tokenized."""
        check_rendering(record, self.tokenizer, self.template, self._placeholder)

    def process(self, images: Sequence[Image.Image]) -> tuple[dict[str, Tensor], list[str]]:
        """Return (the model's inputs of `images`, the text that replaces each image's placeholder)."""
        if not images:
            return {}, []
        text = self.processor.image_token * len(images)
        try:
            found = self.processor(text=[text], images=[list(images)], return_text_replacement_offsets=True, return_tensors="pt")
        except ValueError as error:
            raise DataError(f"the model's {type(self.processor).__name__} refuses an image: {error}") from error
        replaced = found.get("text_replacement_offsets")
        if not replaced:
            raise DataError(f"the model's {type(self.processor).__name__} does not report what replaces an image in a text")
        return {name: value for name, value in found.items() if name not in TEXT_INPUTS}, [each["replacement"] for each in replaced[0]]

    def check_processor(self) -> None:
        """Raise DataError unless the processor's chat template can render a question about an image, and the encoder's ids and inputs of a
        conversation equal those of the processor."""
        check_prompt(self.tokenizer, self.processor.image_token)
        if self.template is not None:
            return
        image, question = Image.new("RGB", _SIZES[1]), f"{IMAGE_TOKEN}\nx"
        inputs, texts = self.process([image])
        ours = self._as_tensors(self._encode(Record("a test conversation", ((question, "y"),), (Path(),)), texts, None)[0]) | inputs
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "y"}]
        text, _ = render(messages, self.tokenizer, None, self._placeholder)
        theirs = self.processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt")
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

    def nothing(self) -> dict[str, Tensor]:
        """Return an item of one padding token without a label."""
        return self._as_tensors({"input_ids": [self.tokenizer.pad_token_id], "labels": [IGNORE_INDEX]})

    def empty_image(self) -> dict[str, Tensor]:
        """Return an item that holds one small image and no text."""
        inputs, (text,) = self.process([Image.new("RGB", _SIZES[0])])
        return self._as_tensors({"input_ids": self.tokenizer(text, add_special_tokens=False)["input_ids"]}) | inputs

    def _encode(self, record: Record, texts: list[str], max_length: int | None) -> tuple[Encoded, bool]:
        images = Images(self._placeholder, texts, self.reserved)
        return encode_within(record, self.tokenizer, self.template, images, max_length)

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
    def _placeholder(self) -> str:
        return self.processor.image_token if self.template is None else IMAGE_TOKEN

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

    def _tokens_of(self, size: tuple[int, int]) -> int:
        return len(self.tokenizer(self._text_of(size), add_special_tokens=False)["input_ids"])
