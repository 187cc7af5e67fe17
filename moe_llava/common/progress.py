"""Report the progress of a long job."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track

from moe_llava.common.messages import format_duration

SECONDS = 30.0  # between two lines, where there is no terminal
T = TypeVar("T")


def with_bar(items: Iterable[T], name: str) -> Iterable[T]:
    """Return an iterator over `items` that shows a progress bar on standard error, if that is a terminal, and removes it at the end."""
    console = Console(stderr=True)
    return track(items, name, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def show_progress(name: str, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of items done. On a terminal it moves a bar; elsewhere it prints a line now and then."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    began = shown = time.monotonic()
    done = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total)

        def advance(number: int) -> None:
            nonlocal done, shown
            done += number
            progress.advance(task, number)
            now = time.monotonic()
            if not console.is_terminal and now - shown > SECONDS:
                shown = now
                left = format_duration((now - began) / done * (total - done))
                console.print(f"{name}: {done:,} of {total:,}, about {left} left", highlight=False)

        yield advance
    console.print(f"{name}: {done:,} in {format_duration(time.monotonic() - began)}", highlight=False)
