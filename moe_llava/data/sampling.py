"""In which order an epoch sees its records."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

POOL = 64  # batches of random records that are sorted by length together: enough for little padding, few enough to stay random


class GroupedSampler(Sampler[int]):
    """Batches of one modality and about one length, in random order: little padding, and no process with images waits for one without.

    The order follows from `seed` and the epoch alone, so a run can go on in the middle of it. At the end of an epoch stands what fills no
    batch of its own, less than two batches.

    `lengths` [N] of the records, in any unit; `has_image` [N] bool; `batch_size` of one process, of which `processes` compute at once.
    """

    def __init__(self, lengths: np.ndarray, has_image: np.ndarray, batch_size: int, processes: int, seed: int):
        self.lengths, self.has_image = lengths, has_image
        self.batch_size, self.processes, self.seed = batch_size, processes, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        at_once = self.batch_size * self.processes
        batches, rest = [], []
        for modality in (True, False):
            group = order[self.has_image[order] == modality]
            for start in range(0, len(group), POOL * at_once):
                pool = self._sorted(group[start : start + POOL * at_once])
                whole = len(pool) // at_once * at_once
                batches += np.split(pool[:whole], whole // at_once) if whole else []
                rest.append(pool[whole:])
        random.shuffle(batches)
        for batch in batches:
            # Neighbours in length go to different processes: none has all the long ones.
            yield from batch.reshape(self.batch_size, self.processes).T.ravel().tolist()
        yield from self._sorted(np.concatenate(rest)).tolist()

    def _sorted(self, indices: np.ndarray) -> np.ndarray:
        """Longest first."""
        return indices[np.argsort(-self.lengths[indices], kind="stable")]
