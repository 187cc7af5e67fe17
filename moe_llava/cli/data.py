"""The verb check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_llava.cli.common import heavy_imports, user_errors, verb

if TYPE_CHECKING:
    from moe_llava.data.check import Measure, Report


@verb("Train", "moe-llava check train.json --images images --model runs/digits/base")
def check(
    data: Annotated[str, typer.Argument(help="a JSON list, JSON lines, a folder of `datasets`, or shards, of which a sample is checked")],
    images: Annotated[Path | None, typer.Option(help="folder that its image names are relative to; default: that of the file")] = None,
    model: Annotated[str | None, typer.Option(help="a LLaVA, a language model or a tokenizer, to count tokens with")] = None,
    template: Annotated[str | None, typer.Option(help="a chat template, such as phi or plain; default: the tokenizer's own")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="tokens beyond which a record is cut")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="to tell how much of a batch would be padding")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Check a data file: list the problems by record, lengths and padding. Exit status 1 if there is a problem."""
    with user_errors():
        from moe_llava.data.check import check_data
        from moe_llava.data.files import is_stream
        from moe_llava.data.templates import TEMPLATES

        if images is not None and is_stream(data):
            raise ValueError(f"--images is {images}, but {data} names shards, which hold their images: leave it out")
        if images is not None and not images.is_dir():
            raise ValueError(f"--images is {images}, which is no folder")
        if template is not None and template not in TEMPLATES:
            raise ValueError(f"--template is {template!r}, but must be one of {', '.join(TEMPLATES)}")
        measure = None if model is None else _measure(model, template, max_length)
        report = check_data(data, images or Path(data).parent, measure)
    counts: dict[str, float] = {
        "records": report.records,
        "text_only": report.text_only,
        "image_as_text": report.image_as_text,
        "images": report.images,
        "videos": report.videos,
        "problems": len(report.problems),
    }
    if measure is not None:
        counts |= {"tokens": sum(report.lengths), "targets": report.targets, "cut": report.cut, "padding": report.padding(batch_size)}
    if as_json:
        print(json.dumps(counts | {"sample": report.sample, "problems": report.problems, "lengths": report.histogram()}))
    else:
        _print_check(report, counts)
    if report.problems:
        raise typer.Exit(1)


def _measure(model: str, template: str | None, max_length: int | None) -> Measure:
    """Return what counts the tokens of a record for `model`; an image is one where there is no vision tower yet. Raise DataError if the
    chat template that is to be used cannot be."""
    from moe_llava.checkpoints.files import check_checkpoint, is_text_model

    text_model = is_text_model(model)
    if not text_model:
        check_checkpoint(model)

    with heavy_imports():  # takes seconds, and a mistake is reported first
        from moe_llava.checkpoints.join import language_tokenizer
        from moe_llava.checkpoints.load import load_processor
        from moe_llava.data.answers import check_template
        from moe_llava.data.encode import encode_within
        from moe_llava.data.encoder import Encoder
        from moe_llava.data.records import IMAGE_TOKEN
        from moe_llava.data.rendering import check_prompt

    if not text_model:
        encoder = Encoder(load_processor(model), template, max_length)
        encoder.check_processor()
        return encoder.measure
    tokenizer = language_tokenizer(model, own_template=template is None)
    print(f"{model} has no vision tower: an image counts as one token", file=sys.stderr)
    check_template(tokenizer, template)
    if template is None:
        check_prompt(tokenizer, IMAGE_TOKEN)
    return lambda record, sizes: encode_within(record, tokenizer, template, 1, max_length)


def _print_check(report: Report, counts: dict[str, float]) -> None:
    from moe_llava.common.messages import MOST_LISTED

    if report.sample:
        print(report.sample)
    for problem in report.problems[:MOST_LISTED]:
        print(problem)
    if len(report.problems) > MOST_LISTED:
        print(f"and {len(report.problems) - MOST_LISTED:,} more, which --json lists")
    print(
        ", ".join(f"{name.replace('_', '-')} {value:.1%}" if name == "padding" else f"{name} {value:,}" for name, value in counts.items())
    )
    histogram = report.histogram()
    for span, count in histogram.items():
        bar = "#" * max(1, round(50 * count / max(histogram.values())))
        print(f"{span:>12} tokens  {bar} {count:,}")
