"""The one error of this room."""


class CheckpointError(ValueError):
    """A folder that is no checkpoint, or whose files are damaged or do not fit each other."""
