"""Checkpoints: loading folders, and the published originals."""
