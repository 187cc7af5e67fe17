"""The command `moe-llava`: a function per verb. Heavy imports stand inside the verbs, so that `--help` is quick."""

from __future__ import annotations

import contextlib

from moe_llava.cli import bench, chat, checkpoints, data, evaluation, experiments, routing, serving, training
from moe_llava.cli.common import app

# importing a file adds its verbs
__all__ = ["app", "bench", "chat", "checkpoints", "data", "evaluation", "experiments", "main", "routing", "serving", "training"]


def main() -> None:
    """Entry point. What a user can put right is one line on standard error and exit status 2."""
    with contextlib.suppress(BrokenPipeError):
        app()
