"""Errors that more than one room raises."""


class DataError(ValueError):
    """Invalid data. The message names the file, the record, the value and the rule."""
