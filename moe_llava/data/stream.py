"""Records of shards, in an order that is never held as a whole, and that a run can resume from any step.

The processes of a run, and the workers of each, have a lane of their own: shards that only they read, again and again, in another order
each time. A lane is shuffled in blocks of `buffer` records, the last of a pass smaller, so a position in it is five numbers: the pass over
its shards, the shard, the record at which the block begins, the number of the block, and how many of its records were used. To resume, one
block is read again.

Positions travel with the batches, as workers read ahead of the step that is saved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from moe_llava.common.errors import DataError
from moe_llava.common.files import read_object, write_whole
from moe_llava.data.records import Record, without_image
from moe_llava.data.shards import ShardError, list_shards, parse_shard_record, read_shard

Position = tuple[int, ...]
START: Position = (0, 0, 0, 0, 0)


class Stream:
    """The `length` records of a run over the shards that `pattern` names.

    An index does not name a record, but the lane whose next record is taken. The indices of a process must come in order, each of its
    batches of `per_device` from a worker of its own, as DataLoader and accelerate share them out.

    `processes`: of the run. `workers`: of each, 0 for a process that reads by itself. `buffer`: records of a block. `stage`: 1, 2 or 3;
    stage 1 needs images.

    Raises DataError as `list_shards` does, or if there are fewer shards than lanes.
    """

    problems: tuple[str, ...] = ()  # records are checked when they are read

    def __init__(self, pattern: str, length: int, per_device: int, processes: int, workers: int, buffer: int, seed: int, stage: int):
        self.pattern, self.length, self.per_device, self.processes, self.workers = pattern, length, per_device, processes, max(workers, 1)
        self.buffer, self.seed, self.stage = buffer, seed, stage
        self.sizes = list_shards(pattern)
        self.shards = list(self.sizes)
        self.lanes = self.processes * self.workers
        if len(self.shards) < self.lanes:
            raise DataError(
                f"shards named by {pattern}: {len(self.shards)}, but {processes} processes with {self.workers} workers each need at least "
                f"{self.lanes}, one for each worker"
            )
        self.positions: dict[int, Position] = {}
        self._open: dict[int, Iterator[tuple[Position, str, Any]]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        """Return the next record of the lane that `index` falls into, and note the position after it in `positions`. Raises DataError if it
        is bad; the one after it is next all the same. Raises ShardError as `read_shard` does."""
        lane = self.lane_of(index)
        if lane not in self._open:
            dealt = np.random.default_rng([self.seed, self.lanes]).permutation(self.shards).tolist()
            self._open[lane] = _read_lane(dealt[lane :: self.lanes], self.buffer, [self.seed, lane], self.positions.get(lane, START))
        self.positions[lane], source, item = next(self._open[lane])
        return self.parse(source, item)

    def parse(self, source: str, item: Any) -> Record:
        """Return the record of a raw one. Raises DataError if it is bad."""
        record = parse_shard_record(source, item)
        if self.stage == 1 and record.token is None:
            raise without_image(source)
        return record

    def lane_of(self, index: int) -> int:
        """Return the lane: processes take turns at batches, and so do the workers of a process."""
        batch, process = divmod(index // self.per_device, self.processes)
        return process + self.processes * (batch % self.workers)

    def digest(self) -> str:
        """Return a digest of the names and sizes of the shards, and of what else decides on the order of records."""
        text = json.dumps([self.sizes, self.buffer, self.seed])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def save(self, save: Path, process: int, positions: dict[int, Position]) -> None:
        """Write where the lanes of a process are."""
        positions = {lane: position for lane, position in positions.items() if lane % self.processes == process}
        write_whole(save / f"stream_{process}.json", json.dumps({"lanes": self._described, "positions": positions}))

    def read_positions(self, save: Path) -> dict[int, Position]:
        """Return where all lanes were at a save. Raises DataError if that is missing, or of a run with other lanes."""
        positions: dict[int, Position] = {}
        for file in save.glob("stream_*.json"):
            found = read_object(file)
            if found["lanes"] != self._described:
                raise DataError(f"{save} is of {found['lanes']}, but this run has {self._described}: a stream is resumed with the same")
            positions |= {int(lane): tuple(position) for lane, position in found["positions"].items()}
        if not positions:
            raise DataError(f"{save} does not say where the stream {self.pattern} was")
        return positions

    @property
    def _described(self) -> str:
        return f"{self.processes} processes with {self.workers} workers and {self.per_device} records at once"


def _read_lane(shards: list[str], buffer: int, seed: list[int], position: Position) -> Iterator[tuple[Position, str, Any]]:
    """Yield (position after it, source, raw record) of a lane, without end, from `position` on. No block goes beyond the end of a pass, so
    every record comes once in each."""
    *begin, block, done = position
    for _, items in groupby(_read_in_turn(shards, seed, *begin), key=lambda item: item[0][0]):
        while found := list(islice(items, buffer)):
            order = np.random.default_rng([*seed, 0, block]).permutation(len(found))
            for used in range(done, len(found)):
                _, source, item = found[order[used]]
                yield (*begin, block, used + 1), source, item
            begin, block, done = list(found[-1][0]), block + 1, 0


def _read_in_turn(shards: list[str], seed: list[int], turn: int, at: int, start: int) -> Iterator[tuple[Position, str, Any]]:
    """Yield ((pass, shard, record) after it, source, raw record) of all shards, again and again. Each pass has an order of its own.

    Raises ShardError as `read_shard` does, or if a whole pass finds no record.
    """
    while True:
        order = np.random.default_rng([*seed, 1, turn]).permutation(len(shards))
        empty = at == start == 0
        for number in range(at, len(shards)):
            for record, source, item in read_shard(shards[order[number]], start):
                empty = False
                yield (turn, number, record + 1), source, item
            start = 0
        if empty:
            raise ShardError(f"{shards[0]} and the {len(shards) - 1} other shards of its process hold no record")
        turn, at = turn + 1, 0


class StreamDataset(Dataset):
    """The items of `dataset`, made of the records of `stream`, with the position after each."""

    def __init__(self, dataset: Dataset, stream: Stream):
        self.dataset, self.stream = dataset, stream

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        lane = self.stream.lane_of(index)
        return item | {"position": (lane, self.stream.positions[lane])}


class StreamCollator:
    """Collate items of StreamDataset with `own`. The batch has `positions`: of its lane, the position after it."""

    def __init__(self, own: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.own = own

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        positions = dict(item.pop("position") for item in items)
        return self.own(items) | {"positions": positions}
