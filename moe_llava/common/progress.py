"""How far a long job is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS = 30.0  # between two lines where there is no terminal


@contextlib.contextmanager
def show_progress(name: str, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Gives what to call with the number of things done: a bar with the time left on a terminal, elsewhere a line now and then."""
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
                left = timespan((now - began) / done * (total - done))
                console.print(f"{name}: {done:,} of {total:,}, about {left} left", highlight=False)

        yield advance
    console.print(f"{name}: {done:,} in {timespan(time.monotonic() - began)}", highlight=False)


def timespan(seconds: float) -> str:
    """As hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
