"""Reads what people keep conversations in, record by record: a JSON list, JSON lines, a folder of Hugging Face `datasets`.

None of them has to fit into memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from moe_llava.common.errors import DataError

CHUNK = 1 << 20  # characters
BOM = b"\xef\xbb\xbf"


def read_items(file: str | Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, the record as it stands there) of a `datasets` folder or Parquet file, a JSON list, or JSON lines, which a file is
    that does not begin with `[`. Images in rows become StoredImages; a line that cannot be read is a DataError in the place of its record.

    Raises DataError if there is nothing, or something else.
    """
    file = Path(file)
    if file.is_dir() or file.suffix == ".parquet":
        from moe_llava.data.folders import read_folder  # takes a second to import, and most data are JSON

        yield from read_folder(file)
        return
    if not file.is_file():
        raise DataError(f"data file {file} does not exist")
    found = 0
    try:
        with file.open("rb") as binary, file.open(encoding="utf-8-sig") as opened:
            start = binary.read(CHUNK).removeprefix(BOM).lstrip()[:1].decode("ascii", "replace")
            binary.seek(0)
            items = _numbered(file, _JsonList(file, opened)) if start == "[" else _read_lines(file, binary)
            for found, item in enumerate(items, start=1):  # noqa: B007
                yield item
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no text in UTF-8: {error}") from error
    if not found:
        raise DataError(f"{file} must hold at least one record, but {'its list' if start else 'it'} is empty")


def _numbered(file: Path, items: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    yield from (_named(f"record {index} of {file}", item) for index, item in enumerate(items))


class _Doubled(str):
    """The key that an object has twice, in the object's place: which of the two values counts, nobody can know."""


def _once_each(pairs: list[tuple[str, Any]]) -> Any:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = [key for key, _ in pairs]
    return _Doubled(next(key for key in keys if keys.count(key) > 1))


def _named(source: str, item: Any) -> tuple[str, Any]:
    """A record and where it stands."""
    return source, DataError(f"{source} has the key {str(item)!r} twice") if isinstance(item, _Doubled) else item


def _read_lines(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """Raises the first line's error if no line can be read: the file is something else."""
    first, some = None, False
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix(BOM) if number == 1 else line
        if not line.strip():
            continue
        item: Any
        try:
            item, some = json.loads(line.decode("utf-8"), object_pairs_hook=_once_each), True
        except (ValueError, RecursionError) as error:
            item = DataError(f"{file} is neither a JSON list nor JSON lines: line {number}: {error}")
            first = first or item
        yield _named(f"line {number} of {file}", item)
    if first and not some:
        raise first


class _JsonList:
    """The items of a JSON list, one by one: `text` is the part of the file that is being read, `at` the place in it."""

    def __init__(self, file: Path, opened: TextIO):
        self.file, self.opened = file, opened
        self.text, self.at, self.passed = "", 0, 0

    def __iter__(self) -> Iterator[Any]:
        decoder = json.JSONDecoder(object_pairs_hook=_once_each)
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
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists within lists within lists
                raise self._error(str(error), self.passed + self.at) from error
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
