"""Read the files of benchmarks. Every error names the file and the line or record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENCODING = "utf-8-sig"  # UTF-8; some editors put a mark in front of it


class BenchmarkError(ValueError):
    """Something is wrong with a benchmark's files, or with answers to it; the message names file, place, value and rule."""


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file. Raise BenchmarkError, naming the file and the line, if it is something else."""
    try:
        content = file.read_bytes()
        return content.decode(ENCODING)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise BenchmarkError(f"line {line} of {file} is not UTF-8 text: it has the byte 0x{content[error.start]:02x}") from error
    except OSError as error:
        raise BenchmarkError(f"{file} cannot be read: {error.strerror}") from error


def read_json(file: Path) -> Any:
    """Raise BenchmarkError if the file is not JSON, or if an object in it has a key twice."""
    return _parsed(read_text(file), str(file))


def read_object(file: Path) -> dict[str, Any]:
    """Raise BenchmarkError, too, if the file holds no JSON object."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise BenchmarkError(f"{file} must be an object, but is {str(content)[:60]}")
    return content


def read_list(file: Path) -> list[Any]:
    """Raise BenchmarkError, too, if the file holds no JSON list."""
    content = read_json(file)
    if not isinstance(content, list):
        raise BenchmarkError(f"{file} must be a list of records, but is {str(content)[:60]}")
    return content


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Raise BenchmarkError, naming the line, if one is no JSON object."""
    records = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        record = _parsed(line, f"line {number} of {file}")
        if not isinstance(record, dict):
            raise BenchmarkError(f"line {number} of {file} must be an object, but is {str(record)[:60]}")
        records.append(record)
    return records


def _parsed(text: str, where: str) -> Any:
    def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise BenchmarkError(f"{where} has the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=once_each)
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"{where} is not JSON: {error}") from error


def once(seen: dict[Any, str], name: str, key: Any, where: str) -> None:
    """Note in `seen` (key -> where it stands) that a record has this key, which its file calls `name`.

    Raise BenchmarkError if another record has it, too.
    """
    first = seen.setdefault(key, where)
    if first != where:
        raise BenchmarkError(f"{where} has the {name} {key!r} once more, after {first}: each must be unique")


def take(record: Mapping[str, Any], key: str, where: str) -> Any:
    """Raises BenchmarkError if a record lacks a key, or is no record."""
    if not isinstance(record, Mapping):
        raise BenchmarkError(f"{where} must be an object, but is {str(record)[:60]}")
    if key not in record:
        raise BenchmarkError(f"{where} has no {key!r}, but {', '.join(map(repr, record)) or 'is empty'}")
    return record[key]


def take_list(record: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """Raises BenchmarkError if a record has no list there."""
    value = take(record, key, where)
    if not isinstance(value, list):
        raise BenchmarkError(f"{where} must have a list of {key!r}, but has {str(value)[:60]}")
    return value


def take_text(record: Mapping[str, Any], key: str, where: str) -> str:
    """Raise BenchmarkError if a record has no string there."""
    value = take(record, key, where)
    if not isinstance(value, str):
        raise BenchmarkError(f"{where} must have a string as {key!r}, but has {str(value)[:60]}")
    return value
