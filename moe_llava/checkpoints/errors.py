"""The one error of this room."""


class CheckpointError(ValueError):
    """A folder that is no checkpoint, or whose files are damaged or do not fit each other."""


def first_line(error: BaseException) -> str:
    """What an error says, in short: libraries' messages may go on for a page, or be empty."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 300 else line[:300] + " ..."
