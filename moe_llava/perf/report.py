"""Print reports and write them to files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# A measurement of a variant -> (column, the column's unit, digits)
COLUMNS: dict[str, tuple[str, float, str]] = {
    "seconds": ("ms", 1e-3, ".4g"),
    "ratio": ("x the limit", 1, ".2f"),
    "processor_ratio": ("x processor time", 1, ".2f"),
    "growth": ("x with the fewest experts", 1, ".2f"),
    "tokens_per_second": ("tokens/s", 1, ".4g"),
    "tflops": ("TFLOP/s", 1, ".4g"),
    "prompt_ratio": ("x the limit, prompt", 1, ".2f"),
    "hits": ("experts found in memory", 1, ".0%"),
    "memory": ("peak MB", 1e6, ",.0f"),
    "memory_ratio": ("x the limit's memory", 1, ".2f"),
    "error": ("error", 1, ".1e"),
}
MEDIANS = ("seconds", "processor_ratio")


def write_report(report: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def print_case(case: dict[str, Any], console: Console) -> None:
    """Print a case of a report: labels, limit, and the measurements of its variants."""
    title = ", ".join(f"{label} {value}" for label, value in case["labels"].items())
    names = [f"{name} (limit)" if name == case["limit"] else name for name in case["variants"]]
    known = [key for key in COLUMNS if any(key in one for one in case["variants"].values())]
    columns = {COLUMNS[key][0]: [_cell(one[key], key) if key in one else "" for one in case["variants"].values()] for key in known}
    print_table(title, {"variant": names}, columns, console)


def print_table(title: str, keys: dict[str, list[str]], columns: dict[str, list[str]], console: Console) -> None:
    """Print columns, header -> cells, after those of `keys`. If they are too wide for the console, break headers between words, then the
    table into parts, each with the keys."""
    everything = keys | columns
    widths = {header: max(map(len, [header, *cells])) for header, cells in everything.items()}
    if _outer(widths.values()) > console.width:
        widths |= {header: max(map(len, [*header.split(), *cells])) for header, cells in columns.items()}
    parts = [dict(keys)]
    for header, cells in columns.items():
        if len(parts[-1]) > len(keys) and _outer(widths[name] for name in [*parts[-1], header]) > console.width:
            parts.append(dict(keys))
        parts[-1][header] = cells
    for part in parts:
        table = Table(title=title if part is parts[0] else None, title_justify="left")
        for header in part:
            table.add_column(header, justify="left" if header in keys else "right", width=widths[header])
        for row in zip(*part.values(), strict=True):
            table.add_row(*row)
        console.print(table)


def _outer(widths: Iterable[int]) -> int:
    """Return the width of a table with columns of these widths: each has a border and two blanks."""
    return sum(width + 3 for width in widths) + 1


def print_notes(report: dict[str, Any], console: Console) -> None:
    for note in report.get("notes", []):
        console.print(note, highlight=False, soft_wrap=True)


def print_conditions(report: dict[str, Any], console: Console) -> None:
    values = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report["conditions"].items())
    console.print(f"{report['bench']}: {values}", highlight=False)


def _cell(value: Any, key: str) -> str:
    """Return a number, or a median, with its low and high for ratios and rates only: a row has no room for more."""
    _, unit, digits = COLUMNS[key]
    if not isinstance(value, dict):
        return _number(value / unit, digits)
    median, low, high = (_number(value[name] / unit, digits) for name in ("median", "low", "high"))
    return median if key in MEDIANS else f"{median} ({low} to {high})"


def _number(value: float, digits: str) -> str:
    return format(value, ",.0f" if value >= 1000 else digits)
