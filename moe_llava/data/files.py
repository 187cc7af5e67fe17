"""Read conversations record by record: from a JSON list, JSON lines, a folder of Hugging Face `datasets`, or a Parquet file.

No file has to fit into memory. `datasets` takes a second to import and few data need it, so it is imported where it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from moe_llava.common.errors import DataError

if TYPE_CHECKING:
    import datasets

CHUNK = 1 << 20  # characters
BOM = b"\xef\xbb\xbf"
IMAGE_KEYS = ("image", "images")
SHARDS = (".parquet", ".tar")  # ends of names
WILDCARDS = frozenset("*?[")
_SPACE = re.compile(r"\s*")


def is_stream(file: str | Path) -> bool:
    """Return whether `file` names shards, which are read as a stream: a URL, a tar file, or Parquet files by a name with wildcards."""
    name = str(file)
    return "://" in name or name.endswith(".tar") or (name.endswith(".parquet") and not WILDCARDS.isdisjoint(name))


def load_item(source: str, text: bytes) -> Any:
    """Return the raw record of a JSON text, or a DataError, naming `source`, if it cannot be read."""
    try:
        item = json.loads(text.removeprefix(BOM).decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        return DataError(f"{source} is not JSON: {error}")
    return _checked(source, item)


def _checked(source: str, item: Any) -> Any:
    return DataError(f"{source} has the key {str(item)!r} twice") if isinstance(item, _DuplicateKey) else item


def read_items(file: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (source, raw record) of a `datasets` folder, a Parquet file, a JSON list or, if a file does not begin with `[`, JSON lines.

    Images in rows become StoredImages. A line that cannot be read yields a DataError in place of its record.

    Raises DataError if the file is missing, empty, or of no such kind.
    """
    file = Path(file)
    if file.is_dir() or file.suffix == ".parquet":
        yield from _read_folder(file)
        return
    if not file.is_file():
        raise DataError(f"data file {file} does not exist")
    found = 0
    try:
        with file.open("rb") as binary, file.open(encoding="utf-8-sig") as opened:
            start = binary.read(CHUNK).removeprefix(BOM).lstrip()[:1].decode("ascii", "replace")
            binary.seek(0)
            items = enumerate(_JsonList(file, opened)) if start == "[" else _read_lines(file, binary)
            kind = "record" if start == "[" else "line"
            for found, (number, item) in enumerate(items, start=1):  # noqa: B007
                source = f"{kind} {number} of {file}"
                yield source, _checked(source, item)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no text in UTF-8: {error}") from error
    if not found:
        raise DataError(f"{file} must hold at least one record, but {'its list' if start else 'it'} is empty")


class _DuplicateKey(str):
    """A key that an object has twice, in place of the object: which of the two values counts is unknown."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = [key for key, _ in pairs]
    return _DuplicateKey(next(key for key in keys if keys.count(key) > 1))


def _read_lines(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """Yield (line number, item). If no line can be read, the file is something else: raise the error of the first line."""
    first, readable = None, False
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix(BOM) if number == 1 else line
        if not line.strip():
            continue
        item: Any
        try:
            item, readable = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys), True
        except (ValueError, RecursionError) as error:
            item = DataError(f"{file} is neither a JSON list nor JSON lines: line {number}: {error}")
            first = first or item
        yield number, item
    if first and not readable:
        raise first


class _JsonList:
    """Iterate over the items of a JSON list. `text` is the part of the file in memory, after `passed` characters; `at` is the position in
    it.

    With a check for duplicate keys, ijson is no faster, and it takes no NaN and no integer beyond 64 bits, and replaces lone surrogates.
    """

    def __init__(self, file: Path, opened: TextIO):
        self.file, self.opened = file, opened
        self.text, self.at, self.passed = "", 0, 0

    def __iter__(self) -> Iterator[Any]:
        decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
        self._expect("[")
        more = self._next() != "]"
        while more:
            yield self._decode(decoder)
            more = self._next() != "]"
            if more:
                self._expect(",")
                self._next()
        self.at += 1
        if self._next():
            raise self._error("something comes after the end of the list", self.at)

    def _decode(self, decoder: json.JSONDecoder) -> Any:
        while True:
            try:
                item, self.at = decoder.raw_decode(self.text, self.at)
                return item
            except json.JSONDecodeError as error:
                mistake = self._error(error.msg, error.pos)
                if not self._read_on():  # otherwise the item may continue in the next part
                    raise mistake from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, very deep nesting
                raise self._error(str(error), self.at) from error

    def _next(self) -> str:
        """Return the next character that is no white space, or "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def _expect(self, character: str) -> None:
        found = self._next()
        if found != character:
            raise self._error(f"expected {character!r}, but found {found or 'the end of the file'!r}", self.at)
        self.at += 1

    def _read_on(self) -> bool:
        """Read at least as much as is left of the text, so that the time for a long item stays proportional to its length."""
        more = self.opened.read(max(CHUNK, len(self.text) - self.at))
        self.passed += self.at
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def _error(self, message: str, at: int) -> DataError:
        return DataError(f"{self.file} is not JSON: {message} (character {self.passed + at})")


@dataclass(frozen=True)
class StoredImage:
    """An image in a row of a `datasets` folder, rather than in a file of its own."""

    folder: Path
    row: int
    number: int

    def __str__(self) -> str:
        return f"{self.number} of row {self.row} of {self.folder}"

    def open(self) -> BinaryIO:
        row = _open_folder(self.folder)[self.row]
        columns = [row[key] if isinstance(row[key], list) else [row[key]] for key in IMAGE_KEYS if row.get(key)]
        images = next(column for column in columns if any(image and (image["bytes"] is not None or image["path"]) for image in column))
        value = images[self.number]
        return BytesIO(value["bytes"]) if value["bytes"] is not None else Path(value["path"]).open("rb")


def _read_folder(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield (source, row), without reading the images in the rows."""
    import datasets

    table = _open_folder(folder)
    stored = [key for key in IMAGE_KEYS if key in table.column_names and _holds_images(table.features[key])]
    row = 0
    for batch in table.with_format("arrow").iter(1000):
        rows = batch.drop_columns(stored).to_pylist()
        for key in stored:
            for index, present in enumerate(_present_images(batch[key], isinstance(table.features[key], datasets.Image))):
                images = [StoredImage(folder, row + index, number) if there else None for number, there in enumerate(present)]
                rows[index][key] = images if any(present) else []
        for item in rows:
            yield f"row {row} of {folder}", {key: value for key, value in item.items() if value is not None}
            row += 1
    if not row:
        raise DataError(f"{folder} must hold at least one record, but its table is empty")


def _present_images(column: Any, single: bool) -> list[list[bool]]:
    """Return, for each row of a column, whether each of its images has bytes or a path. The bytes are not read."""
    import pyarrow.compute as pc

    images = column if single else pc.list_flatten(column)
    rows = range(len(column)) if single else pc.list_parent_indices(column).to_pylist()
    has_path = pc.fill_null(pc.greater(pc.utf8_length(pc.struct_field(images, "path")), 0), False)
    present: list[list[bool]] = [[] for _ in range(len(column))]
    for row, value in zip(rows, pc.or_(pc.is_valid(pc.struct_field(images, "bytes")), has_path).to_pylist(), strict=True):
        present[row].append(value)
    return present


def _holds_images(feature: Any) -> bool:
    """Return whether a column holds images: of the type of `datasets`, bytes, or bytes and path; one in a row, or a list."""
    import datasets

    one = getattr(feature, "feature", feature)
    return isinstance(one, datasets.Image) or _is_binary(one["bytes"] if isinstance(one, dict) and "bytes" in one else one)


def _is_binary(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


@lru_cache(maxsize=8)
def _open_folder(folder: Path) -> datasets.Dataset:
    """Return the table that `save_to_disk` wrote, or the split "train" of Parquet or Arrow files; images stay undecoded.

    Raises DataError if the folder or file holds no single table.
    """
    import datasets

    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise DataError(f"{folder} holds several tables: name one of {', '.join(str(folder / split) for split in splits)}")
    path = str(folder.absolute())  # `datasets` may take a relative name for one of its modules
    try:
        if (folder / "state.json").is_file():
            table = datasets.load_from_disk(folder)
        elif folder.is_file():
            table = datasets.load_dataset("parquet", data_files=path, split="train")
        else:
            table = datasets.load_dataset(path, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{folder} is no folder of `datasets`: {error}") from error
    for key in IMAGE_KEYS:
        if key in table.column_names and _holds_images(table.features[key]):
            raw = datasets.Image(decode=False)
            table = table.cast_column(key, datasets.List(raw) if isinstance(table.features[key], datasets.List) else raw)
    return table
