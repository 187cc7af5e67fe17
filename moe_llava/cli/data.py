"""The verb check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_llava.cli.common import app, heavy_imports, user_errors

if TYPE_CHECKING:
    from moe_llava.data.check import Report


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="a JSON list, JSON lines, or a folder of `datasets`")],
    images: Annotated[Path, typer.Option(help="folder that its image names are relative to")] = Path("."),
    model: Annotated[str | None, typer.Option(help="a checkpoint, to count tokens with its tokenizer: a folder, or a hub id")] = None,
    template: Annotated[str | None, typer.Option(help="a conversation form, such as phi or plain; default: the tokenizer's own")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="tokens beyond which a record is cut")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="to tell how much of a batch would be padding")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Looks through a data file: every problem by record, lengths, padding. Exit status 1 if there is a problem."""
    with user_errors():
        from moe_llava.data.check import check_data
        from moe_llava.data.templates import TEMPLATES

        if template is not None and template not in TEMPLATES:
            raise ValueError(f"--template is {template!r}, but must be one of {', '.join(TEMPLATES)}")
        tokenizer, image_tokens = (None, 1) if model is None else _tokenizer_of(model)
        report = check_data(data, images, tokenizer, template, image_tokens, max_length)
    counts: dict[str, float] = {
        "records": report.records,
        "text_only": report.text_only,
        "images": report.images,
        "problems": len(report.problems),
    }
    if tokenizer is not None:
        counts |= {"tokens": sum(report.lengths), "learnt": report.learnt, "cut": report.cut, "padding": report.padding(batch_size)}
    if as_json:
        print(json.dumps(counts | {"problems": report.problems, "lengths": report.histogram()}))
    else:
        _print_check(report, counts)
    if report.problems:
        raise typer.Exit(1)


def _tokenizer_of(model: str) -> tuple[Any, int]:
    """A checkpoint's tokenizer, and how many tokens an image takes."""
    from moe_llava.checkpoints.files import check_checkpoint

    check_checkpoint(model)

    with heavy_imports():
        from moe_llava.checkpoints.load import load_processor  # takes seconds, and a mistake is told before
        from moe_llava.data.batches import EmptyImage

    processor = load_processor(model)
    return processor.tokenizer, EmptyImage.of(processor).tokens


def _print_check(report: Report, counts: dict[str, float]) -> None:
    for problem in report.problems:
        print(problem)
    print(
        ", ".join(f"{name.replace('_', '-')} {value:.1%}" if name == "padding" else f"{name} {value:,}" for name, value in counts.items())
    )
    histogram = report.histogram()
    for span, count in histogram.items():
        bar = "#" * max(1, round(50 * count / max(histogram.values())))
        print(f"{span:>12} tokens  {bar} {count:,}")
