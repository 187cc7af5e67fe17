"""What the verbs share: the application, and how errors are told."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator
from logging import ERROR, getLogger
from typing import Annotated

import typer

from moe_llava import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Dense vision-language models made sparse: trained, asked, looked into.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"moe-llava {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")] = False,
) -> None: ...


Checkpoint = Annotated[str, typer.Argument(help="a checkpoint folder, or a hub id")]
KeepExperts = Annotated[
    float | None,
    typer.Option(help="share of a sparse model's experts that has room in memory; the others wait on disk, or of a GPU in CPU memory"),
]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns the errors that name what is wrong with the input into one line and exit status 2."""
    # transformers and its hub read these when they are imported, which takes a second: that is left to the verbs that need them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Where bitsandbytes is installed, every import of transformers' Trainer would warn of a kernel that it could have on some CPUs.
    getLogger("bitsandbytes").setLevel(ERROR)
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Around the imports that take seconds. What they make stays to the end, 600,000 objects: the garbage collector is spared looking
    through them, while they come and ever after. That took a fifth of a start, and a second more when the process ended."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def stops() -> Iterator[None]:
    """A run that was asked to stop says so, with the exit status of a process that SIGTERM ended."""
    from moe_llava.training.saves import Stopped

    try:
        yield
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(128 + signal.SIGTERM) from stopped
