"""Talking to a model, alone or with many at once."""
