"""Records of one or several files as one sequence, in Arrow tables on disk. So a million records need little memory, and are read and
checked only once. `sift` leaves out the records that a stage cannot be trained on.

Tables are kept in the cache of Hugging Face `datasets` (HF_DATASETS_CACHE), under the path, size and time of their file.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError

from moe_llava.common.errors import DataError
from moe_llava.common.images import missing_image
from moe_llava.common.messages import listed
from moe_llava.common.progress import with_bar
from moe_llava.common.videos import decoder, missing_video
from moe_llava.data.encoder import Encoder
from moe_llava.data.files import read_items
from moe_llava.data.records import Record, StoredImage, parse_record, without_image

FORMAT = 4  # of the tables; raise it when older tables become wrong
_COLUMNS = datasets.Features(
    {
        "source": datasets.Value("string"),
        "system": datasets.Value("string"),  # empty if there is none
        "turns": datasets.List(datasets.Value("string")),  # questions and answers in turn
        "images": datasets.List(datasets.Value("string")),  # names as in the file; empty for an image in the row itself
        "video": datasets.Value("string"),  # the name of a video file; empty if there is none
        "frames": datasets.List(datasets.Value("string")),  # names of the frames, for a video without a file of its own
        "extra": datasets.Value("string"),  # JSON
        "characters": datasets.Value("int64"),
        "problem": datasets.Value("string"),  # of an invalid record, which is not kept; empty for a valid one
    }
)


class Records(Sequence[Record]):
    """Records in `tables`: (table, its file, the folder of its images). `places` [N, 2]: table and row of each record. `problems`: a line
    for each record that was left out."""

    def __init__(self, tables: list[tuple[datasets.Dataset, Path, Path]], places: np.ndarray, problems: Sequence[str] = ()):
        self.tables = tables
        self.places = places
        self.problems = list(problems)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return self.at(index)
        number, row_number = self.places[index].tolist()
        table, file, folder = self.tables[number]
        row = table[row_number]
        turns = tuple(zip(row["turns"][::2], row["turns"][1::2], strict=True))
        images = tuple(folder / name if name else StoredImage(file, row_number, index) for index, name in enumerate(row["images"]))
        video = folder / row["video"] if row["video"] else tuple(folder / name for name in row["frames"]) or None
        return Record(row["source"], turns, images, json.loads(row["extra"]), row["system"], video)

    def at(self, indices: slice | np.ndarray) -> Records:
        """Return the records at these indices."""
        return Records(self.tables, self.places[indices], self.problems)

    def without(self, problems: dict[int, str]) -> Records:
        """Return the records at other indices than the keys of `problems`, whose values are added to the problems."""
        kept = np.delete(self.places, list(problems), axis=0)
        # A record may occur several times.
        return Records(self.tables, kept, list(dict.fromkeys([*self.problems, *problems.values()])))

    def shapes(self) -> np.ndarray:
        """Return [N] numbers, equal for records that look alike to a chat template: as many turns, and both or neither with a system prompt
        with images and with a video."""
        has_system = self._column(lambda table: pc.not_equal(table["system"], "").to_numpy())
        turns = self._column(lambda table: pc.list_value_length(table["turns"]).to_numpy())
        return turns * 8 + has_system * 4 + (self.image_counts() > 0) * 2 + self.has_video()

    def lengths(self, image_tokens: int, video_tokens: int) -> np.ndarray:
        """Return [N] estimated lengths in tokens: one for four characters, `image_tokens` for an image, `video_tokens` for a video."""
        media = image_tokens * self.image_counts() + video_tokens * self.has_video()
        return self._column(lambda table: table["characters"].to_numpy()) // 4 + media

    def digest(self) -> str:
        """Return a digest of the text of all records, in their order, without images in rows and the content of the files of images and
        videos."""
        found = hashlib.blake2b(self.places.tobytes(), digest_size=16)
        # Without videos, the digest is that of runs begun before there were any.
        columns = ["turns", "images", "system", *(["video", "frames"] if self.has_video().any() else [])]
        for table, *_ in self.tables:
            for batch in table.data.select(columns).to_batches():
                found.update(batch.serialize())
        return found.hexdigest()

    def image_counts(self) -> np.ndarray:
        """Return [N] numbers of images."""
        return self._column(lambda table: pc.list_value_length(table["images"]).to_numpy())

    def has_video(self) -> np.ndarray:
        """Return [N] bool, True for a video file and for a list of frames."""
        return self.has_video_file() | self._column(lambda table: pc.greater(pc.list_value_length(table["frames"]), 0).to_numpy())

    def has_video_file(self) -> np.ndarray:
        """Return [N] bool."""
        return self._column(lambda table: pc.not_equal(table["video"], "").to_numpy())

    def _column(self, read: Callable[[Any], np.ndarray]) -> np.ndarray:
        """Return [N] values, from what `read` returns for the rows of each Arrow table."""
        columns = [read(table.data) for table, *_ in self.tables]
        starts = np.cumsum([0] + [len(column) for column in columns])
        return np.concatenate(columns)[starts[self.places[:, 0]] + self.places[:, 1]]


def load_records(file: str | Path, images: str | Path) -> Records:
    """Return the records of `file` as `read_records` does. Raises DataError with all problems, if a record has one."""
    records = read_records(file, images)
    check_problems(records, file)
    return records


def read_records(file: str | Path, images: str | Path) -> Records:
    """Read a JSON list, JSON lines or a `datasets` folder, and check every record. Names of images and videos are relative to the folder
    `images`.

    An invalid record is left out, and named in `problems`: one without conversation, with roles out of order, with more or fewer
    placeholders than images or videos, or with a missing image or video.

    Raises DataError if the file is missing or none of these.
    """
    file = Path(file)
    parts = sorted(part for part in file.rglob("*") if part.is_file()) if file.is_dir() else [file] if file.is_file() else []
    stamps = [f"{part.name} {part.stat().st_size} {part.stat().st_mtime_ns}" for part in parts]
    key = {"file": str(file), "folder": str(Path.cwd()), "stamps": " ".join(stamps), "format": FORMAT}
    datasets.disable_progress_bars()  # `_rows` has one
    try:
        table = datasets.Dataset.from_generator(_rows, features=_COLUMNS, gen_kwargs=key)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, (DataError, OSError)):
            raise error.__cause__ from None
        raise
    places = np.stack([np.zeros(len(table), np.int64), np.arange(len(table))], axis=1)
    records = Records([(table, file, Path(images))], places)
    invalid = np.flatnonzero(pc.not_equal(table.data["problem"], "").to_numpy()).tolist()
    problems = {row: table[row]["problem"] for row in invalid} | _missing_files(table, Path(images))
    return records.without(dict(sorted(problems.items())))


def check_problems(records: Records, file: str | Path) -> None:
    """Raise DataError with the problems of the records in `file`, if there are any."""
    if records.problems:
        raise DataError(listed(records.problems, f": `moe-llava check {file} --images DIR` shows all"))


def _rows(file: str, folder: str, stamps: str, format: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table. `datasets` keeps it under a digest of all arguments."""
    for source, item in with_bar(read_items(file), f"reading {file}"):
        try:
            record, problem = parse_record(source, item, Path()), ""
        except DataError as error:
            record, problem = Record(source, ()), str(error)
        texts = [text for turn in record.turns for text in turn]
        yield {
            "source": source,
            "system": record.system,
            "turns": texts,
            "images": [str(image) if isinstance(image, Path) else "" for image in record.images],
            "video": str(record.video) if isinstance(record.video, Path) else "",
            "frames": list(map(str, record.video)) if isinstance(record.video, tuple) else [],
            "extra": json.dumps(record.extra, default=str),
            "characters": len(record.system) + sum(map(len, texts)),
            "problem": problem,
        }


def _missing_files(table: datasets.Dataset, images: Path) -> dict[int, str]:
    """Return the problem of each row with a missing image or video file. Listing each folder once is faster than looking for each file."""
    columns = [pc.list_flatten(table.data["images"]), table.data["video"], pc.list_flatten(table.data["frames"])]
    names = {name for column in columns for name in pc.unique(column).to_pylist() if name}
    paths = {folder: images / folder for folder in {os.path.dirname(name) for name in names}}
    present = {folder: set(os.listdir(path)) if path.is_dir() else set() for folder, path in paths.items()}
    missing = {name for name in names if os.path.basename(name) not in present[os.path.dirname(name)]}
    problems = {}
    rows = zip(table["images"], table["video"], table["frames"], strict=True) if missing else ()
    for row, (pictures, video, frames) in enumerate(rows):
        name = next((name for name in (*pictures, video, *frames) if name in missing), None)
        if name is not None:
            refusal = missing_video if name == video else missing_image
            problems[row] = str(refusal(table[row]["source"], images / name))
    return problems


def weighted(records: Records, weight: float, seed: int) -> Records:
    """Return `records` repeated `weight` times. A fraction is drawn without repetition, and kept in order."""
    times, fraction = divmod(weight, 1)
    drawn = random.Random(seed).sample(range(len(records)), round(fraction * len(records)))
    return Records(records.tables, np.concatenate([records.places] * int(times) + [records.places[sorted(drawn)]]), records.problems)


def joined(parts: Iterable[Records]) -> Records:
    """Return all records of `parts`, one part after the other."""
    tables: list[tuple[datasets.Dataset, Path, Path]] = []
    places, problems = [], []
    for part in parts:
        places.append(part.places + np.array([len(tables), 0]))
        tables += part.tables
        problems += part.problems
    return Records(tables, np.concatenate(places), list(dict.fromkeys(problems)))


def sift(records: Records, stage: int, encoder: Encoder) -> Records:
    """Return the records that a stage (1, 2 or 3) can be trained on: with images or a video, which stage 1 needs, with images that fit into
    the encoder's `max_length`, with a video only if the model takes videos, and with a conversation that the chat template takes. The
    others are named in `problems`. What only tokenizing or decoding can show is found during training.

    Raises DataError if there are video files, but nothing to decode them.
    """
    images, image_tokens, max_length = records.image_counts(), encoder.image_tokens or 0, encoder.max_length
    problems = {}
    if len(files := np.flatnonzero(records.has_video_file())):
        first = records[int(files[0])]
        decoder(f"{first.source} names the video {first.video}")
    for index in np.flatnonzero((images == 0) & ~records.has_video()).tolist() if stage == 1 else []:
        problems[index] = str(without_image(records[index].source))
    for index in np.flatnonzero(images * image_tokens >= (max_length or np.inf)).tolist():
        size = images[index] * image_tokens
        problems[index] = f"{records[index].source} has images of {size} tokens, but stage{stage}.max_length is {max_length}"
    left = np.delete(np.arange(len(records)), list(problems))
    # Templates refuse system prompts or numbers of turns. So the first record of each shape is rendered, and the others only if it is
    # refused: rendering a million takes minutes.
    _, firsts, shapes = np.unique(records.shapes()[left], return_index=True, return_inverse=True)
    for shape, first in enumerate(firsts.tolist()):
        if _refusal(records[int(left[first])], encoder):
            refusals = {index: _refusal(records[index], encoder) for index in left[shapes == shape].tolist()}
            problems |= {index: refusal for index, refusal in refusals.items() if refusal}
    return records.without(dict(sorted(problems.items())))


def _refusal(record: Record, encoder: Encoder) -> str:
    """Return the message of the chat template that refuses a record, "" if it takes it."""
    try:
        encoder.check_rendering(record)
    except DataError as error:
        return str(error)
    return ""
