"""Complete commands and file names on the terminal, when Tab is pressed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


class Completer:
    """Complete `commands`, and file names after those in `with_files`."""

    def __init__(self, readline: ModuleType, commands: Sequence[str], with_files: Sequence[str]):
        self._readline = readline
        self._commands = commands
        self._with_files = with_files
        self._found: list[str] = []

    def install(self) -> None:
        self._readline.set_completer(self)
        self._readline.set_completer_delims(" /")  # so that a list of candidates shows names without their folders
        libedit = "libedit" in (self._readline.__doc__ or "")  # macOS has it instead of readline
        self._readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")

    def __call__(self, text: str, state: int) -> str | None:
        """Return candidate number `state` for `text`, the word before the cursor, or None after the last one. Called by readline."""
        if state == 0:
            line = self._readline.get_line_buffer()[: self._readline.get_endidx()].lstrip()
            self._found = [text + rest for rest in self.rests(line)]
        return self._found[state] if state < len(self._found) else None

    def rests(self, line: str) -> list[str]:
        """Return the missing part of each candidate for the end of `line`."""
        name, space, rest = line.partition(" ")
        if not space:
            return [f"{command[len(name) :]} " for command in self._commands if name.startswith("/") and command.startswith(name)]
        if name not in self._with_files:
            return []
        # There may be several files, and a name may have spaces.
        return _file_rests(rest.strip("'\"")) or _file_rests(rest.rpartition(" ")[2].strip("'\""))


def _file_rests(prefix: str) -> list[str]:
    folder, _, partial = prefix.rpartition("/")
    try:
        parent = Path(folder + "/" if prefix.startswith("/") else folder).expanduser()
        entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
    except (OSError, RuntimeError):  # an unknown folder or home
        return []
    shown = [entry for entry in entries if entry.name.startswith(partial) and (partial or not entry.name.startswith("."))]
    return [entry.name[len(partial) :] + ("/" if entry.is_dir() else "") for entry in shown]
