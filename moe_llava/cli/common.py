"""The application, and what its verbs share: groups, options, errors."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from logging import ERROR, getLogger
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from moe_llava import __version__


class Groups(TyperGroup):
    """List the verbs by group, in plain text: typer's own groups need rich, which adds 0.1 s to every start."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if isinstance(command, TyperCommand | TyperGroup):
                groups.setdefault(str(command.rich_help_panel), []).append((name, command.get_short_help_str(limit=120)))
        for title, rows in groups.items():
            with formatter.section(title):
                formatter.write_dl(rows)


app = typer.Typer(
    cls=Groups,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Convert dense vision-language models to sparse ones, train, inspect, evaluate and serve them.",
)


def verb(group: str, *examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds a verb to a group of `moe-llava --help`, with examples below its options."""
    lines = "\n".join(("Example:" if len(examples) == 1 else "Examples:", *(f"  {example}" for example in examples)))
    return app.command(rich_help_panel=group, epilog=f"\b\n{lines}" if examples else None)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"moe-llava {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")] = False,
) -> None: ...


Checkpoint = Annotated[str, typer.Argument(help="a checkpoint folder, or a hub id")]
Dtype = Annotated[
    str,
    typer.Option(help="float32, bfloat16 or float16: load the weights in it; auto: as they are stored, which is float32 after training"),
]
KeepExperts = Annotated[
    float | None,
    typer.Option(help="share of a sparse model's experts that has room in memory; the others wait on disk, or of a GPU in CPU memory"),
]


def with_options(options: type, **kinds: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a verb an option for each field of the dataclass `options`, passed as keyword arguments.

    `kinds` replaces the types of fields that the command line takes in another form.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        signature, hints = inspect.signature(verb, eval_str=True), get_type_hints(options)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        derived = [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=f.default if f.default_factory is dataclasses.MISSING else f.default_factory(),
                annotation=Annotated[kinds.get(f.name, hints[f.name]), typer.Option(help=f.metadata["description"])],
            )
            for f in dataclasses.fields(options)
        ]
        verb.__signature__ = signature.replace(parameters=own + derived)  # type: ignore[attr-defined]
        return verb

    return decorate


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
def stops(how_to_continue: str = "the same command continues it") -> Iterator[None]:
    """Report a run that a signal stopped, with the exit status of a process that SIGTERM ended."""
    from moe_llava.training.saves import Stopped

    try:
        yield
    except Stopped as stopped:
        print(f"{stopped}: {how_to_continue}", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGTERM) from stopped
