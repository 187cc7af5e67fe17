"""The command `moe-llava`: a function per verb. Heavy imports stand inside the verbs, so that `--help` is quick."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

from moe_llava.cli import bench, chat, checkpoints, data, evaluation, experiments, routing, serving, training
from moe_llava.cli.common import app

# importing a file adds its verbs
__all__ = ["app", "bench", "chat", "checkpoints", "data", "evaluation", "experiments", "main", "routing", "serving", "training"]


def main() -> None:
    """Entry point. What a user can put right is one line on standard error and exit status 2."""
    wait_asleep()
    end_with_torchrun()
    with contextlib.suppress(BrokenPipeError):
        app()


def wait_asleep() -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless the user has said how they wait.

    By default they spin, and keep cores that other processes need. OpenMP reads the variable when torch is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def end_with_torchrun() -> None:
    """Let the kernel end this process when torchrun, which started it, is killed: it would continue, and hold its stage's lock."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
