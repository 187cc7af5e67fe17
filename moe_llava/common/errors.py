"""Errors that more than one room raises."""


class DataError(ValueError):
    """Invalid data. The message names the file, the record, the value and the rule."""


class CheckpointError(ValueError):
    """A folder that is no checkpoint, or whose files are damaged or contradict each other."""
