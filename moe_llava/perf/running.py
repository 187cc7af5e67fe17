"""A running benchmark: its current case, its progress, and the table of every case as soon as it is measured.

Unusual here: the time left is that of the current case, whose rounds all take the same time; cases of different sizes do not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moe_llava.common.messages import format_duration
from moe_llava.common.progress import SECONDS
from moe_llava.perf.measure import CutShort, bench_device, summary
from moe_llava.perf.report import print_case, print_conditions


class Interrupted(Exception):
    """Ctrl-C. `report`: the measurements until then."""

    def __init__(self, report: dict[str, Any], case: int, total: int):
        super().__init__(f"stopped in case {case} of {total}")
        self.report = report


class Cases:
    """The cases of a report, in sequence: `begin`, a call after each round, `end`."""

    def __init__(self, report: dict[str, Any], total: int, console: Console, progress: Progress):
        self.report, self.total, self.console, self.progress = report, total, console, progress
        self.labels: dict[str, Any] = {}
        self.ends: list[float] = []  # of the rounds
        self.shown = time.monotonic()
        self.task = progress.add_task("", total=report["rounds"])

    def begin(self, labels: dict[str, Any]) -> None:
        self.labels, self.ends = labels, []
        self.progress.reset(self.task, description=self._description())

    def __call__(self, number: int) -> None:
        """Show that a round is complete."""
        self.ends.append(time.monotonic())
        self.progress.update(self.task, advance=number, description=self._description())
        if not self.console.is_terminal and self.ends[-1] - self.shown > SECONDS:
            self.shown = self.ends[-1]
            self.console.print(self._description(), highlight=False, soft_wrap=True)

    def end(self, limit: str, variants: dict[str, dict[str, Any]], **notes: Any) -> None:
        """Add a case to the report and print it. `notes`: further labels."""
        case = {"labels": self.labels | notes, "limit": limit, "variants": variants}
        self.report["cases"].append(case)
        print_case(case, self.console)

    def _description(self) -> str:
        rounds, done = self.report["rounds"], len(self.ends)
        text = f"case {len(self.report['cases']) + 1} of {self.total}, round {min(done + 1, rounds)} of {rounds}"
        if not 2 <= done < rounds:  # the first round includes the warm-up
            return text
        return f"{text}, about {format_duration((self.ends[-1] - self.ends[0]) / (done - 1) * (rounds - done))} left of it"


@contextmanager
def show_cases(report: dict[str, Any], total: int, console: Console) -> Iterator[Cases]:
    """Raise Interrupted at Ctrl-C. A case that was stopped after a complete round is in the report, with its complete rounds."""
    print_conditions(report, console)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        cases = Cases(report, total, console, progress)
        try:
            yield cases
        except KeyboardInterrupt as error:
            running = len(report["cases"]) + 1
            if isinstance(error, CutShort):
                limit = next(iter(error.timings))  # variants begin with it
                cases.end(limit, summary(error.timings, limit, bench_device()), rounds=len(error.timings[limit].seconds))
            raise Interrupted(report, running, total) from None
