"""In which order an epoch sees its records."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

POOL = 64  # batches of random records that are sorted by length together: enough for little padding, few enough to stay random


class GroupedSampler(Sampler[int]):
    """Batches of one modality and about one length, in random order: little padding, and no process with images waits for one without.

    Which records a step sees follows from `seed` and the epoch alone, so a run can go on in the middle of it, in another number of
    processes, too. At the end of an epoch stands what fills no batch of its own, less than two batches.

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
                pool = self._sorted(group[start : start + POOL * size])
                whole = len(pool) // size * size
                batches += np.split(pool[:whole], whole // size) if whole else []
                rest.append(pool[whole:])
        random.shuffle(batches)
        for batch in batches:
            # Neighbours in length go to different processes: none has all the long ones.
            yield from batch.reshape(-1, self.per_device, self.processes).transpose(0, 2, 1).ravel().tolist()
        yield from self._sorted(np.concatenate(rest)).tolist()

    def _sorted(self, indices: np.ndarray) -> np.ndarray:
        """Longest first."""
        return indices[np.argsort(-self.lengths[indices], kind="stable")]
