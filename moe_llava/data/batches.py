"""From records to batches: token ids, label masks, pixels.

A record that cannot be read is handed on as what is wrong with it, under "problem", and "problems" of a batch: it is for the trainer to
stop or to go on without it, in whatever process it was read.

Shapes: B rows, S sequence, N images of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from moe_llava.common.errors import DataError
from moe_llava.common.images import open_image
from moe_llava.data.answers import check_template
from moe_llava.data.encode import IGNORE_INDEX, IMAGE_INDEX, encode_within
from moe_llava.data.records import Record


class ConversationDataset(Dataset):
    """Records as model inputs: `input_ids` and `labels` [S], `pixel_values` [images, 3, H, W] (absent without images).

    Labels are the answers, their end token included. `template` is a conversation form, None the tokenizer's own. What comes after
    `max_length` tokens is cut off.
    """

    def __init__(self, records: Sequence[Record], processor: Any, template: str | None = None, max_length: int | None = None):
        self.records = records
        self.processor = processor
        self.template = template
        self.max_length = max_length
        if processor.tokenizer.pad_token_id is None:
            raise DataError("the tokenizer has no pad token, which batches are padded with")
        check_template(processor.tokenizer, template)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._encode(self.records[index])
        except DataError as error:
            return {"problem": str(error)}

    def _encode(self, record: Record) -> dict[str, Tensor]:
        item: dict[str, Tensor] = {}
        tokens_per_image = 0
        if record.images:
            images = [open_image(path, record.source) for path in record.images]
            item["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
            tokens_per_image = image_tokens(self.processor, item["pixel_values"])
        encoded, _ = encode_within(record, self.processor.tokenizer, self.template, tokens_per_image, self.max_length)
        ids, labels = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["labels"])
        item["input_ids"] = ids.masked_fill(ids == IMAGE_INDEX, self.processor.image_token_id)
        item["labels"] = labels.masked_fill(labels == IMAGE_INDEX, IGNORE_INDEX)
        return item


def image_tokens(processor: Any, pixel_values: Tensor) -> int:
    """Placeholders per image: patches, plus the tower's extra tokens, less the class token where the features leave it out."""
    height, width = pixel_values.shape[-2:]
    number = (height // processor.patch_size) * (width // processor.patch_size) + processor.num_additional_image_tokens
    return number - (processor.vision_feature_select_strategy == "default")


@dataclass(frozen=True)
class EmptyImage:
    """Stands in a batch of text alone, where no token sees it: so the projector takes part in every step, in every process. Without it a
    process without images would keep its neighbours waiting for the projector's gradients.

    `pixels` [1, 3, H, W]; `tokens` placeholders with the id `token_id`, as many as any image has: the processor brings all to one size.
    """

    pixels: Tensor
    tokens: int
    token_id: int

    @classmethod
    def of(cls, processor: Any) -> EmptyImage:
        pixels = processor.image_processor([Image.new("RGB", (8, 8))], return_tensors="pt")["pixel_values"]
        return cls(pixels, image_tokens(processor, pixels), processor.image_token_id)

    def add_to(self, batch: dict[str, Tensor]) -> None:
        """Puts it after the end of the first row, outside the labels, and outside the attention mask, or as one more packed sample: that
        has no attention mask, so a `token_mask` tells the routers' losses and capacities of it."""
        rows = batch["input_ids"].shape[0]
        if "position_ids" in batch:
            batch["token_mask"] = torch.ones_like(batch["input_ids"])
        added = {name: torch.full((rows, self.tokens), fill) for name, fill in _PADDING.items() if name in batch}
        added["input_ids"][0] = self.token_id  # one image, one row of placeholders
        if "position_ids" in batch:
            added["position_ids"] = torch.arange(self.tokens)[None]
        for name, tensor in added.items():
            batch[name] = torch.cat([batch[name], tensor], dim=1)
        batch["pixel_values"] = self.pixels


_PADDING = {"input_ids": 0, "attention_mask": 0, "token_mask": 0, "labels": IGNORE_INDEX}


@dataclass(frozen=True)
class Collator:
    """Pads to the longest row on the right; or, `packed`, puts all samples into one row, where each has positions of its own. transformers
    tells them apart by these, and lets none attend to another. `empty_image` goes into batches that have none."""

    pad_token_id: int
    empty_image: EmptyImage | None = None
    packed: bool = False

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        problems = [item["problem"] for item in items if "problem" in item]
        # Where nothing is left, a token that is not learnt keeps the step in step with other processes.
        nothing = {"input_ids": torch.tensor([self.pad_token_id]), "labels": torch.tensor([IGNORE_INDEX])}
        items = [item for item in items if "problem" not in item] or [nothing]
        batch: dict[str, Any] = self._pack(items) if self.packed else self._pad(items)
        pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        elif self.empty_image is not None:
            self.empty_image.add_to(batch)
        return batch | ({"problems": problems} if problems else {})

    def _pad(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids_BS = pad_sequence([item["input_ids"] for item in items], batch_first=True, padding_value=self.pad_token_id)
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        return {
            "input_ids": ids_BS,
            "attention_mask": (torch.arange(ids_BS.shape[1]) < lengths[:, None]).long(),
            "labels": pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=IGNORE_INDEX),
        }

    def _pack(self, items: list[dict[str, Tensor]]) -> dict[str, Any]:
        labels = [item["labels"].clone() for item in items]
        for sample in labels:
            sample[0] = IGNORE_INDEX  # what comes before it belongs to another sample
        return {
            "input_ids": torch.cat([item["input_ids"] for item in items])[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([torch.arange(len(item["labels"])) for item in items])[None],
            "use_cache": False,  # with a cache transformers does not look at the positions
        }
