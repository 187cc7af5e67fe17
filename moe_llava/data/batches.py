"""From records to batches: token ids, labels, pixels, and the order of an epoch.

A record that cannot be read is passed on as its problem, under "problem" of an item and "problems" of a batch, whatever process read it.
The trainer decides whether to stop.

Shapes: B rows, S sequence, N images of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from moe_llava.common.errors import DataError
from moe_llava.data.encode import IGNORE_INDEX
from moe_llava.data.encoder import EXPERT_TYPES, TOKEN_TYPES, Encoder
from moe_llava.data.records import Record
from moe_llava.data.stream import Stream

POOL = 64  # random batches that are sorted by length together: enough for little padding, few enough to stay random
# The inputs with a value for each token, and that of padding. All others belong to images.
_PADDING = {"input_ids": 0, "attention_mask": 0, "token_mask": 0, "labels": IGNORE_INDEX}
_PADDING |= dict.fromkeys((*TOKEN_TYPES, EXPERT_TYPES), 0)
TOKEN_INPUTS = frozenset(_PADDING)


class ConversationDataset(Dataset):
    """Records as the inputs that `encoder` makes of them. The labels are the answers, including their end tokens. A record that cannot be
    encoded has the key `problem` alone."""

    def __init__(self, records: Sequence[Record] | Stream, encoder: Encoder):
        self.records = records
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self.encode(self.records[index])
        except DataError as error:
            return {"problem": str(error)}

    def encode(self, record: Record) -> dict[str, Any]:
        """Return the item of a record. Raises DataError as the encoder does."""
        return dict(self.encoder(record))


@dataclass(frozen=True)
class Collator:
    """Pad items on the right to the longest row. With `packed`, put all samples into one row instead, each with positions of its own, by
    which transformers keeps their attention apart.

    `nothing`: an item of one padding token (`Encoder.nothing`). `empty_image`: an item (`Encoder.empty_image`) that no token sees, added to
    a batch of text alone. With it the projector takes part in every step of every process; otherwise a process without images would keep
    the others waiting for the projector's gradients.
    """

    nothing: dict[str, Tensor]
    empty_image: dict[str, Tensor] | None = None
    packed: bool = False

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        problems = [item["problem"] for item in items if "problem" in item]
        # If nothing is left, one token without a label keeps this process in step with the others.
        items = [item for item in items if "problem" not in item] or [self.nothing]
        batch: dict[str, Any] = self._pack(items) if self.packed else self._pad(items)
        images = concatenated([{name: value for name, value in item.items() if name not in _PADDING} for item in items])
        batch |= images
        if not images and self.empty_image is not None:
            self._add_empty_image(batch, self.empty_image)
        return batch | ({"problems": problems} if problems else {})

    def _add_empty_image(self, batch: dict[str, Tensor], image: dict[str, Tensor]) -> None:
        """Append the image to the first row, outside labels and attention mask. A packed batch has no attention mask: there it is one more
        sample, and a `token_mask` excludes it from the routers' losses and capacities."""
        rows, length = batch["input_ids"].shape[0], len(image["input_ids"])
        if self.packed:
            batch["token_mask"] = torch.ones_like(batch["input_ids"])
        added = {name: torch.full((rows, length), fill) for name, fill in _PADDING.items() if name in batch}
        for name in added.keys() & image.keys():
            added[name][0] = image[name]  # one image, one row of placeholders
        if self.packed:
            added["position_ids"] = torch.arange(length)[None]
        for name, tensor in added.items():
            batch[name] = torch.cat([batch[name], tensor], dim=1)
        batch |= {name: tensor for name, tensor in image.items() if name not in _PADDING}

    def _pad(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        padding = _PADDING | {"input_ids": int(self.nothing["input_ids"])}
        batch = {
            name: pad_sequence([item[name] for item in items], batch_first=True, padding_value=padding[name])
            for name in _PADDING.keys() & items[0].keys()
        }
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        return batch | {"attention_mask": (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()}

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


def padded_left(inputs: Mapping[str, Tensor], columns: int, fill: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """Return the inputs of a row, [1, S] for tokens, with `columns` more tokens before: those of `fill`, or 0."""
    return {
        name: F.pad(value, (columns, 0), value=(fill or {}).get(name, 0)) if name in TOKEN_INPUTS else value
        for name, value in inputs.items()
    }


def concatenated(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the inputs of the images of all `parts`, some of which may have none."""
    names = dict.fromkeys(name for part in parts for name in part)  # in order
    return {name: _cat_padded([part[name] for part in parts if name in part]) for name in names}


def _cat_padded(tensors: list[Tensor]) -> Tensor:
    """Concatenate inputs of images, [images or patches, ...], padded with zeros in the other dimensions: images of other sizes, or of fewer
    tiles."""
    sizes = [max(lengths) for lengths in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    missing = [[size - length for size, length in zip(sizes, tensor.shape[1:], strict=True)] for tensor in tensors]
    return torch.cat(
        [
            F.pad(tensor, [each for length in reversed(lengths) for each in (0, length)]) if any(lengths) else tensor
            for tensor, lengths in zip(tensors, missing, strict=True)
        ]
    )


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
