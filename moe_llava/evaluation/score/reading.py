"""Read the files of benchmarks. Every error names the file, and the line or the record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ENCODING = "utf-8-sig"  # UTF-8, with or without the byte order mark that some editors write


class BenchmarkError(ValueError):
    """A benchmark's files, or answers to it, are wrong. The message names the file, the place, the value and the rule."""


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file. Raises BenchmarkError, naming the line, if a byte is not UTF-8."""
    try:
        content = file.read_bytes()
        return content.decode(ENCODING)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise BenchmarkError(f"line {line} of {file} is not UTF-8 text: it has the byte 0x{content[error.start]:02x}") from error
    except OSError as error:
        raise BenchmarkError(f"{file} cannot be read: {error.strerror}") from error


def read_json(file: Path) -> Any:
    """Return the content of a JSON file. Raises BenchmarkError if it is not JSON, or if an object in it has a key twice."""
    return _parse(read_text(file), str(file))


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises BenchmarkError if it holds something else."""
    return _checked(read_json(file), str(file), dict, "must be an object")


def read_list(file: Path) -> list[Any]:
    """Return the JSON list in a file. Raises BenchmarkError if it holds something else."""
    return _checked(read_json(file), str(file), list, "must be a list of records")


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Return the JSON object of each line. Raises BenchmarkError, naming the line, if a line holds something else."""
    lines = ((f"line {number} of {file}", line) for number, line in enumerate(read_text(file).split("\n"), start=1) if line.strip())
    return [_checked(_parse(line, where), where, dict, "must be an object") for where, line in lines]


def _parse(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise BenchmarkError(f"{where} has the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"{where} is not JSON: {error}") from error


def _checked(value: Any, where: str, kind: type | tuple[type, ...], rule: str) -> Any:
    if not isinstance(value, kind):
        raise BenchmarkError(f"{where} {rule}, but {'is' if rule.startswith('must be') else 'has'} {str(value)[:60]}")
    return value


def numbered(records: Iterable[Any], name: str, file: Path, *unique: str, start: int = 1) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for each record; the place is "`name` 3 of `file`", for error messages.

    Raises BenchmarkError if two records have the same values under all of the keys `unique`.
    """
    seen: dict[Any, str] = {}
    for number, record in enumerate(records, start=start):
        where = f"{name} {number} of {file}"
        if unique:
            once(seen, " and ".join(unique), ", ".join(str(take(record, key, where)) for key in unique), where)
        yield where, record


def once(seen: dict[Any, str], name: str, key: Any, where: str) -> None:
    """Add a record's key to `seen` (key -> place). Its file calls the key `name`.

    Raises BenchmarkError if another record has the same key.
    """
    first = seen.setdefault(key, where)
    if first != where:
        raise BenchmarkError(f"{where} has the {name} {key!r} once more, after {first}: each must be unique")


def take(record: Mapping[str, Any], key: str, where: str) -> Any:
    """Return the value of a key. Raises BenchmarkError if it is missing, or if `record` is no object."""
    if key not in _checked(record, where, Mapping, "must be an object"):
        raise BenchmarkError(f"{where} has no {key!r}, but {', '.join(map(repr, record)) or 'is empty'}")
    return record[key]


def take_list(record: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """Return the list under a key. Raises BenchmarkError if there is none."""
    return _checked(take(record, key, where), where, list, f"must have a list of {key!r}")


def take_text(record: Mapping[str, Any], key: str, where: str) -> str:
    """Return the string under a key. Raises BenchmarkError if there is none."""
    return _checked(take(record, key, where), where, str, f"must have a string as {key!r}")
