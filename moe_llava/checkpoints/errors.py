"""The error of this room, and how it is worded."""


class CheckpointError(ValueError):
    """A folder that is no checkpoint, or whose files are damaged or do not fit each other."""


LISTED = 20


def listed(problems: list[str]) -> str:
    """One problem per line, indented; of many, the first ones and a count."""
    shown = problems[:LISTED] + ([f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else [])
    return "\n  ".join(shown)


def first_line(error: BaseException) -> str:
    """What an error says, in short: libraries' messages may go on for a page, or be empty."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 300 else line[:300] + " ..."
