"""Reads what people keep conversations in, record by record: a JSON list, JSON lines, a folder of Hugging Face `datasets`.

None of them has to fit into memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow.compute as pc

from moe_llava.data.records import IMAGE_KEYS, DataError, StoredImage

CHUNK = 1 << 20  # characters


def read_items(file: str | Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, the record as it stands there) of a `datasets` folder or Parquet file, a JSON list, or JSON lines, which a file is
    that does not begin with `[`. Images in rows become StoredImages.

    Raises DataError if there is nothing, or something else.
    """
    file = Path(file)
    if file.is_dir() or file.suffix == ".parquet":
        yield from _read_folder(file)
        return
    if not file.is_file():
        raise DataError(f"data file {file} does not exist")
    found = 0
    try:
        with file.open(encoding="utf-8-sig") as opened:
            start = opened.read(CHUNK).lstrip()[:1]
            opened.seek(0)
            items = _numbered(file, _JsonList(file, opened)) if start == "[" else _read_lines(file, opened)
            for found, item in enumerate(items, start=1):  # noqa: B007
                yield item
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no text in UTF-8: {error}") from error
    if not found:
        raise DataError(f"{file} must hold at least one record, but {'its list' if start else 'it'} is empty")


def _numbered(file: Path, items: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    yield from ((f"record {index} of {file}", item) for index, item in enumerate(items))


def _read_lines(file: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number} of {file}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file} is neither a JSON list nor JSON lines: line {number}: {error}") from error


class _JsonList:
    """The items of a JSON list, one by one: `text` is the part of the file that is being read, `at` the place in it."""

    def __init__(self, file: Path, opened: TextIO):
        self.file, self.opened = file, opened
        self.text, self.at, self.passed = "", 0, 0

    def __iter__(self) -> Iterator[Any]:
        decoder = json.JSONDecoder()
        self._expect("[")
        if self._next() == "]":
            self._finish()
            return
        while True:
            self._next()
            try:
                item, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                place = self.passed + error.pos
                if self._read_on():  # perhaps it goes on beyond what was read
                    continue
                raise self._error(error.msg, place) from error
            self.at = end
            yield item
            if self._next() == "]":
                self._finish()
                return
            self._expect(",")

    def _finish(self) -> None:
        self._expect("]")
        if self._next():
            raise self._error("something comes after the end of the list", self.passed + self.at)

    def _next(self) -> str:
        """The character that comes after white space; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def _expect(self, character: str) -> None:
        found = self._next()
        if found != character:
            raise self._error(f"expected {character!r}, but found {found or 'the end of the file'!r}", self.passed + self.at)
        self.at += 1

    def _read_on(self) -> bool:
        """Reads as much again as is waiting to be understood, so that a long item costs no more than its length."""
        more = self.opened.read(max(CHUNK, len(self.text) - self.at))
        self.passed += self.at
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def _error(self, message: str, place: int) -> DataError:
        return DataError(f"{self.file} is not JSON: {message} (character {place})")


def _read_folder(folder: Path) -> Iterator[tuple[str, Any]]:
    """Rows, without reading the images in them."""
    table = open_folder(folder)
    stored = [key for key in IMAGE_KEYS if key in table.column_names and _holds_images(table.features[key])]
    row = 0
    for batch in table.with_format("arrow").iter(1000):
        rows = batch.drop_columns(stored).to_pylist()
        for key in stored:
            single = isinstance(table.features[key], datasets.Image)
            numbers = pc.cast(pc.is_valid(batch[key]), "int64") if single else pc.fill_null(pc.list_value_length(batch[key]), 0)
            for place, number in enumerate(numbers.to_pylist()):
                rows[place][key] = [StoredImage(folder, row + place, index) for index in range(number)]
        for item in rows:
            yield f"row {row} of {folder}", {key: value for key, value in item.items() if value is not None}
            row += 1
    if not row:
        raise DataError(f"{folder} must hold at least one record, but its table is empty")


def image_values(folder: Path, row: int) -> list[dict[str, Any]]:
    """`bytes`, or else `path`, of each image in a row."""
    values = open_folder(folder)[row]
    value = next(values[key] for key in IMAGE_KEYS if values.get(key) is not None)
    return value if isinstance(value, list) else [value]


def _holds_images(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def _load_parquet(path: Path) -> datasets.Dataset:
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=str(path.absolute()), split="train")
    return datasets.load_dataset(str(path.absolute()), split="train")  # a relative name may be that of one of its modules


@lru_cache(maxsize=8)
def open_folder(folder: Path) -> datasets.Dataset:
    """The table of a folder that `save_to_disk` wrote, or the split "train" of one with Parquet or Arrow files, or a Parquet file; images
    undecoded.

    Raises DataError if it is neither.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise DataError(f"{folder} holds several tables: name one of {', '.join(str(folder / split) for split in splits)}")
    saved = (folder / "state.json").is_file()
    try:
        table = datasets.load_from_disk(folder) if saved else _load_parquet(folder)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{folder} is no folder of `datasets`: {error}") from error
    for key in IMAGE_KEYS:
        if key in table.column_names and _holds_images(table.features[key]):
            raw = datasets.Image(decode=False)
            table = table.cast_column(key, raw if isinstance(table.features[key], datasets.Image) else datasets.List(raw))
    return table
