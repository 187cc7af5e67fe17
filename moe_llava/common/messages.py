"""Parts of messages to users: suggestions, lists, differences, sizes, durations."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_LISTED = 20


def did_you_mean(name: str, known: Iterable[str], otherwise: str, prefix: str = "") -> str:
    """Return "; did you mean X?" for the known name that is closest to `name`, with `prefix` before it, or `otherwise` if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else otherwise


def listed(problems: Sequence[str], hint: str = "") -> str:
    """Return one problem per line, indented. A long list is cut: its last line is the number of the others, and `hint`."""
    more = len(problems) - MOST_LISTED
    return "\n  ".join([*problems[:MOST_LISTED], *([f"and {more} more{hint}"] if more > 0 else [])])


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened. Messages of libraries may fill a page, or be empty."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 300 else line[:300] + " ..."


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return "NAME VALUE, now VALUE" for each setting that differs between two mappings."""
    return [f"{name} {before.get(name)}, now {now.get(name)}" for name in {**before, **now} if before.get(name) != now.get(name)]


def format_bytes(number: float) -> str:
    """Return a number of bytes with a unit, such as 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.1f} {unit}" if unit != "bytes" else f"{number:.0f} bytes"
        number /= 1000
    return f"{number:,.1f} TB"


def format_duration(seconds: float) -> str:
    """Return a duration as hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
