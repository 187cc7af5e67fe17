"""Continuous batching: token ids in, text out. Knows nothing of HTTP."""
