"""Records of one or several files as one sequence, in an Arrow table that stays on disk: a million cost little memory, and are read and
checked only the first time.

The table is kept where Hugging Face `datasets` keeps its own (HF_DATASETS_CACHE), under the file's path, size and time.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from rich.console import Console
from rich.progress import track

from moe_llava.common.errors import DataError
from moe_llava.common.images import missing_image
from moe_llava.data.files import read_items
from moe_llava.data.records import Record, StoredImage, parse_record

MOST_SHOWN = 20
FORMAT = 3  # of the table; raise it when a change to reading makes tables of before wrong
_COLUMNS = datasets.Features(
    {
        "source": datasets.Value("string"),
        "system": datasets.Value("string"),  # empty if there is none
        "turns": datasets.List(datasets.Value("string")),  # questions and answers in turn
        "images": datasets.List(datasets.Value("string")),  # names as in the file; empty for an image that stands in the row itself
        "extra": datasets.Value("string"),  # JSON
        "characters": datasets.Value("int64"),
        "problem": datasets.Value("string"),  # what is wrong with the record, of which nothing else is kept then; empty if nothing is
    }
)


class Records(Sequence[Record]):
    """`tables`: (table, its file, the folder that its image names are relative to). `places` [N, 2]: table and row of each record.
    `problems`: what is wrong with those that were left out, a line for each."""

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
            return Records(self.tables, self.places[index], self.problems)
        number, row = self.places[index].tolist()
        table, file, images = self.tables[number]
        return _record(table[row], row, file, images)

    def without(self, problems: dict[int, str]) -> Records:
        """Those at other indices than the keys of `problems`, which say what is wrong with the record there."""
        kept = np.delete(self.places, list(problems), axis=0)
        # A record may stand here several times.
        return Records(self.tables, kept, list(dict.fromkeys([*self.problems, *problems.values()])))

    def shapes(self) -> np.ndarray:
        """[N] what a chat template sees of each, as one number: how many turns, whether a system prompt, whether images."""
        system = self._column(lambda table: pc.not_equal(table.data.column("system"), "").to_numpy())
        turns = self._column(lambda table: np.asarray(pc.list_value_length(table.data.column("turns"))))
        return turns * 4 + system * 2 + (self.image_counts() > 0)

    def lengths(self, image_tokens: int) -> np.ndarray:
        """[N] what each takes in tokens, about: a token for four characters, and `image_tokens` for an image."""
        characters = self._column(lambda table: np.asarray(table.data.column("characters")))
        return characters // 4 + image_tokens * self.image_counts()

    def digest(self) -> str:
        """Of all that the records say, in their order: other records have another one. Images in rows, and image files, are not in it."""
        found = hashlib.blake2b(self.places.tobytes(), digest_size=16)
        for table, *_ in self.tables:
            for batch in table.data.select(["turns", "images", "system"]).to_batches():
                found.update(batch.serialize())
        return found.hexdigest()

    def image_counts(self) -> np.ndarray:
        """[N] images of each."""
        return self._column(lambda table: np.asarray(pc.list_value_length(table.data.column("images"))))

    def _column(self, read: Any) -> np.ndarray:
        columns = [read(table) for table, *_ in self.tables]
        starts = np.cumsum([0] + [len(column) for column in columns])
        return np.concatenate(columns)[starts[self.places[:, 0]] + self.places[:, 1]]


def _record(row: dict[str, Any], number: int, file: Path, images: Path) -> Record:
    turns = tuple(zip(row["turns"][::2], row["turns"][1::2], strict=True))
    places = tuple(images / name if name else StoredImage(file, number, index) for index, name in enumerate(row["images"]))
    return Record(row["source"], turns, places, json.loads(row["extra"]), row["system"])


def load_records(file: str | Path, images: str | Path) -> Records:
    """As `read_records`. Raises DataError also, with all problems, if there is one with any record."""
    records = read_records(file, images)
    check_problems(records, file)
    return records


def read_records(file: str | Path, images: str | Path) -> Records:
    """Reads `file`, a JSON list, JSON lines or a `datasets` folder, and checks every record; image names are relative to the folder
    `images`. A record without conversation, roles out of order, more or fewer `<image>` than images, an image that is missing: what is bad
    is left out, and named in `problems`.

    Raises DataError if the file is missing or none of these.
    """
    file = Path(file)
    parts = sorted(part for part in file.rglob("*") if part.is_file()) if file.is_dir() else [file] if file.is_file() else []
    stamps = [f"{part.name} {part.stat().st_size} {part.stat().st_mtime_ns}" for part in parts]
    key = {"file": str(file), "folder": str(Path.cwd()), "stamps": " ".join(stamps), "format": FORMAT}
    datasets.disable_progress_bars()  # there is one below
    try:
        table = datasets.Dataset.from_generator(_rows, features=_COLUMNS, gen_kwargs=key)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, (DataError, OSError)):
            raise error.__cause__ from None
        raise
    places = np.stack([np.zeros(len(table), np.int64), np.arange(len(table))], axis=1)
    records = Records([(table, file, Path(images))], places)
    bad = np.flatnonzero(pc.not_equal(table.data.column("problem"), "").to_numpy()).tolist()
    problems = {row: table[row]["problem"] for row in bad} | _missing_images(table, Path(images))
    return records.without(dict(sorted(problems.items())))


def check_problems(records: Records, file: str | Path) -> None:
    """Raises DataError with the problems of `file`'s records, if there are any."""
    more = len(records.problems) - MOST_SHOWN
    rest = [f"and {more} more: `moe-llava check {file} --images DIR` shows all"] if more > 0 else []
    if records.problems:
        raise DataError("\n  ".join(records.problems[:MOST_SHOWN] + rest))


def _rows(file: str, folder: str, stamps: str, format: int) -> Iterator[dict[str, Any]]:
    """Rows of the table; all arguments together are what it is kept under."""
    console = Console(stderr=True)
    for source, item in track(read_items(file), f"reading {file}", console=console, transient=True, disable=not console.is_terminal):
        try:
            record, problem = parse_record(source, item, Path()), ""
        except DataError as error:
            record, problem = Record(source, ()), str(error)
        values = [text for turn in record.turns for text in turn]
        yield {
            "source": source,
            "system": record.system,
            "turns": values,
            "images": [str(image) if isinstance(image, Path) else "" for image in record.images],
            "extra": json.dumps(record.extra, default=str),
            "characters": len(record.system) + sum(map(len, values)),
            "problem": problem,
        }


def _missing_images(table: datasets.Dataset, images: Path) -> dict[int, str]:
    """Row -> what is wrong with a record of which an image file is not there. Folders are listed once each: that is quicker than to look
    for each file."""
    names = pc.unique(pc.list_flatten(table.data.column("images"))).to_pylist()
    listed = {folder: _names_in(images / folder) for folder in {os.path.dirname(name) for name in names}}
    missing = {name for name in names if name and os.path.basename(name) not in listed[os.path.dirname(name)]}
    problems = {}
    for row, record_names in enumerate(table["images"] if missing else ()):
        name = next((name for name in record_names if name in missing), None)
        if name is not None:
            problems[row] = str(missing_image(table[row]["source"], images / name))
    return problems


def _names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def weighted(records: Records, weight: float, seed: int) -> Records:
    """`records` as often as `weight` says; of its fraction, so many of them, drawn without repetition and kept in order."""
    times, fraction = divmod(weight, 1)
    drawn = random.Random(seed).sample(range(len(records)), round(fraction * len(records)))
    return Records(records.tables, np.concatenate([records.places] * int(times) + [records.places[sorted(drawn)]]), records.problems)


def joined(parts: Iterable[Records]) -> Records:
    """All records of `parts`, one after the other."""
    tables: list[tuple[datasets.Dataset, Path, Path]] = []
    places, problems = [], []
    for part in parts:
        places.append(part.places + np.array([len(tables), 0]))
        tables += part.tables
        problems += part.problems
    return Records(tables, np.concatenate(places), list(dict.fromkeys(problems)))
