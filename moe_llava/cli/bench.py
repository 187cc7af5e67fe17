"""The verb bench, and a name for each thing that it measures."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_llava.cli.common import Checkpoint, app, heavy_imports, user_errors
from moe_llava.perf.options import DTYPES, LAYER_SIZES, MODEL_SIZES, PHASES, SHARES, BenchError, check_file, check_names, parse_size

if TYPE_CHECKING:
    import torch

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure speed and memory as ratios to a dense model with as many active parameters.",
)
app.add_typer(bench, name="bench", rich_help_panel="Evaluate")

Rounds = Annotated[int, typer.Option(min=1, help="in each of which every variant has its turn")]
Dtypes = Annotated[list[str], typer.Option("--dtype", help="float32, bfloat16 or float16; may be given several times")]
ModelSizes = Annotated[list[str], typer.Option("--size", help=f"{', '.join(MODEL_SIZES)}; may be given several times")]
Rows = Annotated[int | None, typer.Option(min=1, help="of a batch; default: the size's own")]
Tokens = Annotated[int | None, typer.Option(min=1, help="of a row, with those of its image; default: the size's own")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="a file for all that was measured")]


@bench.command()
def layer(
    size: Annotated[list[str], typer.Option(help="tokens x width x FFN width; may be given several times")] = list(LAYER_SIZES),  # noqa: B006
    dtype: Dtypes = ["float32", "bfloat16"],  # noqa: B006
    phase: Annotated[list[str], typer.Option(help="forward, or forward+backward; may be given several times")] = list(PHASES),  # noqa: B006
    experts: Annotated[int, typer.Option(min=1, help="of a layer")] = 4,
    top_k: Annotated[int, typer.Option(min=1, help="experts that a token goes through; the dense FFN is as many times as wide")] = 2,
    growth: Annotated[bool, typer.Option(help="also how the time grows from 4 to 64 experts, at 2048x256x704")] = True,
    rounds: Rounds = 5,
    as_json: JsonFile = None,
) -> None:
    """Compare all backends of a sparse layer, checked against float64, with a dense layer k times as wide."""
    with user_errors():
        sizes = [parse_size(text, experts, top_k) for text in size]
        check_names("--phase", phase, PHASES)
        dtypes = _dtypes(dtype, as_json)

        with heavy_imports():
            from moe_llava.perf.layer import bench_layer

        _measure(lambda: bench_layer(sizes, dtypes, [name for name in PHASES if name in phase], rounds, growth, _console()), as_json)


@bench.command()
def model(
    size: ModelSizes = ["digits", "middle"],  # noqa: B006
    dtype: Dtypes = ["float32"],  # noqa: B006
    rows: Rows = None,
    tokens: Tokens = None,
    rounds: Rounds = 5,
    as_json: JsonFile = None,
) -> None:
    """Compare the prefill of a sparse model with that of a dense one with as many active parameters."""
    with user_errors():
        check_names("--size", size, MODEL_SIZES)
        dtypes = _dtypes(dtype, as_json)

        with heavy_imports():
            from moe_llava.perf.pairs import bench_model

        _measure(lambda: bench_model(size, dtypes, rows, tokens, rounds, _console()), as_json)


@bench.command()
def train(
    size: ModelSizes = ["digits", "middle"],  # noqa: B006
    dtype: Dtypes = ["float32"],  # noqa: B006
    rows: Rows = None,
    tokens: Tokens = None,
    logits: Annotated[bool, typer.Option(help="also the memory that logits take with a vocabulary of 151,936: 4 GB, a minute")] = True,
    rounds: Rounds = 5,
    as_json: JsonFile = None,
) -> None:
    """Compare time and memory of a training step of stage III with those of a dense model with as many active parameters."""
    with user_errors():
        check_names("--size", size, MODEL_SIZES)
        dtypes = _dtypes(dtype, as_json)

        with heavy_imports():
            from moe_llava.perf.train import bench_train

        _measure(lambda: bench_train(size, dtypes, rows, tokens, rounds, "wide" if logits else None, _console()), as_json)


@bench.command()
def generate(
    checkpoint: Annotated[str | None, typer.Argument(help="a sparse checkpoint; default: a random model of --size")] = None,
    size: Annotated[str | None, typer.Option(help=f"of a random model: {', '.join(MODEL_SIZES)}; default: middle")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    rows: Annotated[list[int], typer.Option(min=1, help="answers at once; may be given several times")] = [1, 8],  # noqa: B006
    new_tokens: Annotated[int, typer.Option(min=1, help="of every answer")] = 32,
    compiled: Annotated[bool, typer.Option("--compile", help="also with a static cache, for which a GPU's steps are compiled")] = False,
    rounds: Rounds = 5,
    as_json: JsonFile = None,
) -> None:
    """Compare greedy decoding of a sparse model with that of a dense one with as many active parameters."""
    with user_errors():
        from moe_llava.checkpoints.files import check_checkpoint

        if checkpoint is not None:
            if size is not None:
                raise BenchError("a checkpoint has its own size: leave --size out")
            check_checkpoint(checkpoint)
        size = size or "middle"
        check_names("--size", [size], MODEL_SIZES)
        (chosen,) = _dtypes([dtype], as_json)

        with heavy_imports():
            from moe_llava.perf.generate import bench_generate

        _measure(lambda: bench_generate(checkpoint, size, chosen, rows, new_tokens, rounds, compiled, _console()), as_json)


@bench.command()
def serve(
    checkpoint: Checkpoint,
    clients: Annotated[int, typer.Option(min=2, help="that ask at once")] = 8,
    questions: Annotated[int, typer.Option(min=1, help="in each round; a quarter as many where answers are long")] = 96,
    rounds: Rounds = 5,
    as_json: JsonFile = None,
) -> None:
    """Compare many clients at once with one, and a prefix cache with none, on servers with a checkpoint of the digits data."""
    with user_errors():
        from importlib.util import find_spec

        from moe_llava.checkpoints.files import check_checkpoint

        check_file(as_json)
        check_checkpoint(checkpoint)
        if find_spec("psutil") is None:
            raise BenchError("bench serve needs psutil, which is not installed: pip install -e '.[bench]'")

        with heavy_imports():
            from moe_llava.perf.serve import bench_serve, print_serving

        console = _console()
        _measure(lambda: bench_serve(checkpoint, clients, rounds, questions, console), as_json, print_serving)


@bench.command()
def load(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint folder")],
    image: Annotated[Path | None, typer.Option(help="to ask about; default: a grey one")] = None,
    question: Annotated[str, typer.Option(help="to ask")] = "describe the image .",
    rounds: Rounds = 3,
    as_json: JsonFile = None,
) -> None:
    """Measure memory and time of loading a checkpoint, and the time of `chat` from its start to the answer."""
    with user_errors():
        from moe_llava.checkpoints.files import check_checkpoint
        from moe_llava.common.images import open_image

        check_file(as_json)
        check_checkpoint(checkpoint)
        if image is not None:
            open_image(image, "bench load")

        with heavy_imports():
            from moe_llava.perf.loading import bench_load

        _measure(lambda: bench_load(checkpoint, image, question, rounds, _console()), as_json)


@bench.command()
def offload(
    checkpoint: Annotated[Path | None, typer.Argument(help="a sparse checkpoint folder; default: two random ones of 2 GB")] = None,
    keep: Annotated[list[float], typer.Option(help="the share of the experts in memory; may be given several times")] = list(SHARES),  # noqa: B006
    tokens: Annotated[int, typer.Option(min=1, help="that are written, one at a time")] = 32,
    as_json: JsonFile = None,
) -> None:
    """Measure the time per token for several shares of experts in memory, with the others on disk."""
    with user_errors():
        from moe_llava.checkpoints.files import check_checkpoint, check_share

        check_file(as_json)
        for share in keep:
            check_share("--keep", share)
            if checkpoint is not None:
                check_checkpoint(checkpoint, share)

        with heavy_imports():
            from moe_llava.perf.offload import bench_offload

        _measure(lambda: bench_offload(checkpoint, keep, tokens, _console()), as_json)


def _dtypes(names: list[str], file: Path | None) -> list[torch.dtype]:
    """The named ones, once all that is light has been checked."""
    check_names("--dtype", names, DTYPES)
    check_file(file)

    import torch

    return [getattr(torch, name) for name in names]


def _console() -> Any:
    from rich.console import Console

    return Console()


def _measure(measure: Callable[[], dict[str, Any]], file: Path | None, show: Callable[[dict[str, Any], Any], None] | None = None) -> None:
    """Write a report and print what has not been printed while it was measured: its notes, if not what `show` prints. Ctrl-C keeps what was
    measured until then."""
    from moe_llava.perf.report import print_notes, write_report
    from moe_llava.perf.running import Interrupted

    stopped = None
    try:
        report = measure()
    except Interrupted as interrupted:
        report, stopped = interrupted.report, interrupted
    write_report(report, file)
    (show or print_notes)(report, _console())
    if stopped is not None:
        print(stopped, file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT)
