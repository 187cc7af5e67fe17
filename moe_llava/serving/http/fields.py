"""Read the values of a JSON body. An error names the place, such as `messages.0.content.1.image_url.detail`, the rule and the value.

Unusual here: null counts as absent, whatever the field, because clients' libraries write it for unset options.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

MOST_SHOWN = 40  # characters of a value or a name: a client sent them

T = TypeVar("T")
Read = Callable[[Any, str], T]  # value and its place -> what is kept; raises FieldError


class FieldError(ValueError):
    """A value is not accepted; the message names its place and the rule."""

    def __init__(self, place: str, rule: str):
        super().__init__(f"{place or 'the body'}: {rule}")
        self.place = place


def shown(found: Any) -> str:
    """Describe a value in a few words."""
    if isinstance(found, list | dict):
        return {list: "a list", dict: "an object"}[type(found)]
    if isinstance(found, str):
        return f"the text {json.dumps(_short(found), ensure_ascii=False)}"
    return _short(json.dumps(found))


def must_be(rule: str, found: Any, place: str) -> FieldError:
    return FieldError(place, f"must be {rule}, but is {shown(found)}")


def text(found: Any, place: str) -> str:
    if not isinstance(found, str):
        raise must_be("a text", found, place)
    return found


def boolean(found: Any, place: str) -> bool:
    if not isinstance(found, bool):
        raise must_be("true or false", found, place)
    return found


def whole(low: int, high: int) -> Read[int]:
    """Take whole numbers of a range."""

    def read(found: Any, place: str) -> int:
        if type(found) is not int or not low <= found <= high:
            raise must_be(f"a whole number from {low} to {high}", found, place)
        return found

    return read


def number(low: float, high: float, above: bool = False) -> Read[float]:
    """Take numbers of a range; `above`: without `low` itself. NaN is in no range."""

    def read(found: Any, place: str) -> float:
        if type(found) not in (int, float) or not low <= found <= high or (above and found == low):
            rule = f"a number above {low:g} and at most {high:g}" if above else f"a number from {low:g} to {high:g}"
            raise must_be(rule, found, place)
        return float(found)

    return read


def one_of(*values: str) -> Read[str]:
    def read(found: Any, place: str) -> str:
        if not isinstance(found, str) or found not in values:
            raise must_be(_either(values), found, place)
        return found

    return read


def only(*values: Any) -> Read[None]:
    """Take values that have no effect, and drop them."""

    def read(found: Any, place: str) -> None:
        if not any(found == value and isinstance(found, bool) == isinstance(value, bool) for value in values):
            taken = _either([json.dumps(value) for value in values])
            raise FieldError(place, f"not supported: leave it out (of its values only {taken} is taken, which asks for nothing)")

    return read


def label(found: Any, place: str) -> None:
    """Drop a text: a name for the client's own use."""
    text(found, place)


def labels(found: Any, place: str) -> None:
    """Drop an object that holds names for the client's own use."""
    if not isinstance(found, dict):
        raise must_be("an object", found, place)


def items(read: Read[T], rule: str) -> Read[list[T]]:
    """Take lists of at least one value, each by `read`. `rule`: for the message."""

    def read_all(found: Any, place: str) -> list[T]:
        if not isinstance(found, list):
            raise must_be(rule, found, place)
        if not found:
            raise FieldError(place, f"must be {rule}, but is empty")
        return [read(value, f"{place}.{number}") for number, value in enumerate(found)]

    return read_all


def by_kind(name: str, readers: Mapping[str, Read[T]]) -> Read[T]:
    """Take objects whose field `name` selects the reader."""

    def read(found: Any, place: str) -> T:
        if not isinstance(found, dict):
            raise must_be("an object", found, place)
        if found.get(name) is None:
            raise FieldError(f"{place}.{name}", f"is missing: must be {_either(list(readers))}")
        return readers[one_of(*readers)(found[name], f"{place}.{name}")](found, place)

    return read


def fields(
    found: Any, place: str, kept: Mapping[str, Read[Any]], required: Sequence[str], dropped: Mapping[str, Read[Any]]
) -> dict[str, Any]:
    """Return the fields of an object that are `kept`. Those that are `dropped` are only checked; any other is an error."""
    if not isinstance(found, dict):
        rule = f"an object with {' and '.join(required)}" if required else "an object"
        raise must_be(rule, found, place)
    begin = f"{place}." if place else ""
    given = {name: value for name, value in found.items() if value is not None}
    readers = {**kept, **dropped}
    for name in given:
        if name not in readers:
            close = difflib.get_close_matches(name[:MOST_SHOWN], kept, n=1, cutoff=0.8)
            advice = f"did you mean {close[0]}?" if close else "leave it out"
            raise FieldError(f"{begin}{_short(name)}", f"not supported: {advice}")
    for name in required:
        if name not in given:
            raise FieldError(f"{begin}{name}", "is missing")
    values = {name: readers[name](value, f"{begin}{name}") for name, value in given.items()}
    return {name: value for name, value in values.items() if name in kept}


def _short(words: str) -> str:
    return words if len(words) <= MOST_SHOWN else f"{words[:MOST_SHOWN]}..."


def _either(values: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(values[:-1]), values[-1]]))
