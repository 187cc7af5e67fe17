"""Looks through a data file before it is trained on: every problem by record, the lengths, what padding would cost.

Shapes: none; lengths are tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from moe_llava.common.errors import DataError
from moe_llava.common.images import open_image
from moe_llava.data.encode import encode_within
from moe_llava.data.files import read_items
from moe_llava.data.records import IMAGE_TOKEN, Record, parse_record


@dataclass
class Report:
    """`image_as_text`: records without an image whose text has `<image>`. `problems`: (where, what). `lengths`: of each sound record,
    in tokens, with its images. `cut`: how many of them the limit cuts. Lengths and cuts need a tokenizer."""

    records: int = 0
    images: int = 0
    text_only: int = 0
    image_as_text: int = 0
    problems: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    learnt: int = 0
    cut: int = 0

    def histogram(self) -> dict[str, int]:
        """Records by length, in powers of two."""
        counts = Counter((length - 1).bit_length() for length in self.lengths)
        return {f"{2 ** (power - 1) + 1}-{2**power}" if power else "1": counts[power] for power in sorted(counts)}

    def padding(self, batch_size: int) -> float:
        """The share of a batch that is padding, if batches of `batch_size` are drawn in the file's order."""
        batches = [self.lengths[start : start + batch_size] for start in range(0, len(self.lengths), batch_size)]
        places = sum(max(batch) * len(batch) for batch in batches)
        return 1 - sum(self.lengths) / places if places else 0.0


def check_data(
    file: str | Path,
    images: str | Path,
    tokenizer: Any = None,
    template: str | None = None,
    image_tokens: int = 1,
    max_length: int | None = None,
) -> Report:
    """Reads every record and decodes every image once.

    Args:
        tokenizer: to count tokens with, and to see that there is something to learn; without it, neither is done.
        template, image_tokens: as `encode_record`.
        max_length: tokens beyond which a record is cut.

    Raises DataError only if the file itself cannot be read.
    """
    report, seen = Report(), set()
    console = Console(stderr=True)
    for source, item in track(read_items(file), "checking", console=console, transient=True, disable=not console.is_terminal):
        report.records += 1
        try:
            record = parse_record(source, item, Path(images))
            for path in record.images:
                if path not in seen:
                    seen.add(path)
                    open_image(path, source)
            if tokenizer is not None:
                _measure(report, record, tokenizer, template, image_tokens, max_length)
            report.text_only += not record.images
            report.image_as_text += not record.images and any(IMAGE_TOKEN in text for turn in record.turns for text in turn)
        except DataError as error:
            report.problems.append(str(error))
    report.images = len(seen)
    return report


def _measure(report: Report, record: Record, tokenizer: Any, template: str | None, image_tokens: int, max_length: int | None) -> None:
    kept, was_cut = encode_within(record, tokenizer, template, image_tokens, max_length)
    report.cut += was_cut
    report.lengths.append(len(kept["labels"]))
    report.learnt += sum(label >= 0 for label in kept["labels"])
