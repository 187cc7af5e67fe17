"""The command `moe-llava`: a function per verb. Heavy imports stand inside the verbs, so that `--help` is quick."""

from __future__ import annotations

import contextlib

from moe_llava.cli import chat, checkpoints, data, evaluation, experiments, training
from moe_llava.cli.common import app

__all__ = ["app", "chat", "checkpoints", "data", "evaluation", "experiments", "main", "training"]  # importing a file adds its verbs


def main() -> None:
    """Entry point. What a user can put right is one line on standard error and exit status 2."""
    with contextlib.suppress(BrokenPipeError):
        app()
