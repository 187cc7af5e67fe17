"""From records to batches: token ids, labels, pixels, and the order of an epoch.

A record that cannot be read is passed on as its problem, under "problem" of an item and "problems" of a batch, whatever process read it.
The trainer decides whether to stop.

Shapes: B rows, S sequence, N images of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from moe_llava.common.errors import DataError
from moe_llava.common.images import open_image
from moe_llava.data.answers import check_template
from moe_llava.data.encode import IGNORE_INDEX, IMAGE_INDEX, encode_within
from moe_llava.data.records import Record

POOL = 64  # random batches that are sorted by length together: enough for little padding, few enough to stay random
_PADDING = {"input_ids": 0, "attention_mask": 0, "token_mask": 0, "labels": IGNORE_INDEX}


class ConversationDataset(Dataset):
    """Records as model inputs: `input_ids` and `labels` [S], `pixel_values` [images, 3, H, W] (absent without images).

    Labels are the answers, including their end tokens. `template`: a chat template, a key of TEMPLATES; None for the tokenizer's own. Items
    are cut after `max_length` tokens.
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
    """Return the number of placeholders of an image: its patches and the tower's extra tokens, less a class token that is left out."""
    height, width = pixel_values.shape[-2:]
    number = (height // processor.patch_size) * (width // processor.patch_size) + processor.num_additional_image_tokens
    return number - (processor.vision_feature_select_strategy == "default")


@dataclass(frozen=True)
class EmptyImage:
    """An image for a batch of text alone, which no token sees. With it the projector takes part in every step of every process; otherwise a
    process without images would keep the others waiting for the projector's gradients.

    `pixels` [1, 3, H, W]; `tokens` placeholders with the id `token_id`, as many as any image has: the processor resizes all to one size.
    """

    pixels: Tensor
    tokens: int
    token_id: int

    @classmethod
    def of(cls, processor: Any) -> EmptyImage:
        pixels = processor.image_processor([Image.new("RGB", (8, 8))], return_tensors="pt")["pixel_values"]
        return cls(pixels, image_tokens(processor, pixels), processor.image_token_id)

    def add_to(self, batch: dict[str, Tensor]) -> None:
        """Append the image to the first row, outside labels and attention mask. A packed batch has no attention mask: there it is one more
        sample, and a `token_mask` excludes it from the routers' losses and capacities."""
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


@dataclass(frozen=True)
class Collator:
    """Pad items on the right to the longest row. With `packed`, put all samples into one row instead, each with positions of its own, by
    which transformers keeps their attention apart. `empty_image` is added to batches without images."""

    pad_token_id: int
    empty_image: EmptyImage | None = None
    packed: bool = False

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        problems = [item["problem"] for item in items if "problem" in item]
        # If nothing is left, one token without a label keeps this process in step with the others.
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
            sample[0] = IGNORE_INDEX  # the token before it belongs to another sample
        return {
            "input_ids": torch.cat([item["input_ids"] for item in items])[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([torch.arange(len(item["labels"])) for item in items])[None],
            "use_cache": False,  # with a cache, transformers ignores the positions
        }


class GroupedSampler(Sampler[int]):
    """Sample batches of one modality and similar length, in random order: little padding, and no process with images waits for one without.

    The records of a step depend on `seed` and the epoch alone, so a run can be resumed in the middle of an epoch, also with another number
    of processes. Records that fill no batch of their own, fewer than two batches, come at the end of an epoch.

    `lengths` [N] of the records, in any unit; `has_image` [N] bool; `batch_size` of a step, of which each of `processes` computes
    `per_device` at once.
    """

    def __init__(self, lengths: np.ndarray, has_image: np.ndarray, batch_size: int, per_device: int, processes: int, seed: int):
        self.lengths, self.has_image = lengths, has_image
        self.batch_size, self.per_device, self.processes, self.seed = batch_size, per_device, processes, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        size = self.batch_size
        batches, rest = [], []
        for modality in (True, False):
            group = order[self.has_image[order] == modality]
            for start in range(0, len(group), POOL * size):
                pool = self._longest_first(group[start : start + POOL * size])
                whole = len(pool) // size * size
                batches += np.split(pool[:whole], whole // size) if whole else []
                rest.append(pool[whole:])
        random.shuffle(batches)
        for batch in batches:
            # Neighbours in length go to different processes, so that none gets all the long ones.
            yield from batch.reshape(-1, self.per_device, self.processes).transpose(0, 2, 1).ravel().tolist()
        yield from self._longest_first(np.concatenate(rest)).tolist()

    def _longest_first(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(-self.lengths[indices], kind="stable")]
