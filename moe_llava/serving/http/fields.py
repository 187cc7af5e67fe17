"""Read the values of a JSON body. An error names the path, such as `messages.0.content.1.image_url.detail`, the rule and the value.

Unusual here: null counts as absent, whatever the field, because clients' libraries write it for unset options.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

MAX_SHOWN = 40  # characters of a value or a name in a message

T = TypeVar("T")
Read = Callable[[Any, str], T]  # a value and its path -> the value that is kept; raises FieldError


class FieldError(ValueError):
    """A value is not accepted; the message names its path and the rule."""

    def __init__(self, path: str, rule: str):
        super().__init__(f"{path or 'the body'}: {rule}")
        self.path = path


def described(value: Any) -> str:
    """Describe a value in a few words."""
    match value:
        case list():
            return "a list"
        case dict():
            return "an object"
        case str():
            return f"the string {json.dumps(_short(value), ensure_ascii=False)}"
    return _short(json.dumps(value))


def must_be(rule: str, value: Any, path: str) -> FieldError:
    return FieldError(path, f"must be {rule}, but is {described(value)}")


def string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise must_be("a string", value, path)
    return value


def mapping(value: Any, path: str, rule: str = "an object") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise must_be(rule, value, path)
    return value


def boolean(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise must_be("true or false", value, path)
    return value


def integer(low: int, high: int) -> Read[int]:
    """Accept integers of a range."""

    def read(value: Any, path: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise must_be(f"an integer from {low} to {high}", value, path)
        return value

    return read


def number(low: float, high: float, above: bool = False) -> Read[float]:
    """Accept numbers of a range; `above`: without `low` itself. NaN is in no range."""

    def read(value: Any, path: str) -> float:
        if type(value) not in (int, float) or not low <= value <= high or (above and value == low):
            rule = f"a number above {low:g} and at most {high:g}" if above else f"a number from {low:g} to {high:g}"
            raise must_be(rule, value, path)
        return float(value)

    return read


def one_of(*values: str) -> Read[str]:
    def read(value: Any, path: str) -> str:
        if not isinstance(value, str) or value not in values:
            raise must_be(_either(values), value, path)
        return value

    return read


def only(*values: Any) -> Read[None]:
    """Accept and drop values that have no effect."""

    def read(value: Any, path: str) -> None:
        if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in values):
            accepted = _either([json.dumps(allowed) for allowed in values])
            raise FieldError(path, f"not supported: leave it out (only {accepted} is accepted, without effect)")

    return read


def items(read: Read[T], rule: str) -> Read[list[T]]:
    """Accept lists of at least one value, each read by `read`. `rule`: for the message."""

    def read_all(value: Any, path: str) -> list[T]:
        if not isinstance(value, list):
            raise must_be(rule, value, path)
        if not value:
            raise FieldError(path, f"must be {rule}, but is empty")
        return [read(item, f"{path}.{number}") for number, item in enumerate(value)]

    return read_all


def by_kind(name: str, readers: Mapping[str, Read[T]]) -> Read[T]:
    """Accept objects whose field `name` selects the reader."""

    def read(value: Any, path: str) -> T:
        if mapping(value, path).get(name) is None:
            raise FieldError(f"{path}.{name}", f"is missing: must be {_either(list(readers))}")
        return readers[one_of(*readers)(value[name], f"{path}.{name}")](value, path)

    return read


def read_object(
    value: Any, path: str, kept: Mapping[str, Read[Any]], required: Sequence[str], dropped: Mapping[str, Read[Any]]
) -> dict[str, Any]:
    """Return the fields of an object that are `kept`. Those that are `dropped` are only checked; any other is an error."""
    rule = f"an object with {' and '.join(required)}" if required else "an object"
    given = {name: found for name, found in mapping(value, path, rule).items() if found is not None}
    begin = f"{path}." if path else ""
    readers = {**kept, **dropped}
    for name in given:
        if name not in readers:
            close = difflib.get_close_matches(name[:MAX_SHOWN], kept, n=1, cutoff=0.8)
            advice = f"did you mean {close[0]}?" if close else "leave it out"
            raise FieldError(f"{begin}{_short(name)}", f"not supported: {advice}")
    for name in required:
        if name not in given:
            raise FieldError(f"{begin}{name}", "is missing")
    values = {name: readers[name](found, f"{begin}{name}") for name, found in given.items()}
    return {name: found for name, found in values.items() if name in kept}


def _short(words: str) -> str:
    return words if len(words) <= MAX_SHOWN else f"{words[:MAX_SHOWN]}..."


def _either(values: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(values[:-1]), values[-1]]))
