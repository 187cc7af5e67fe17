"""Check a data file before training: every problem by record, the lengths of records, and the cost of padding. Lengths are in tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_llava.common.errors import DataError
from moe_llava.common.images import open_image
from moe_llava.common.progress import with_bar
from moe_llava.common.videos import Video, open_video, uniform
from moe_llava.data.encode import Encoded
from moe_llava.data.files import is_stream, read_items
from moe_llava.data.records import IMAGE_TOKEN, Record, parse_record
from moe_llava.data.shards import list_shards, parse_shard_record, sample

Measure = Callable[[Record, list[tuple[int, int]]], tuple[Encoded, bool]]


@dataclass
class Report:
    """The result of `check_data`. Without `measure` there are no lengths, targets and cuts.

    `videos`: number of records with one. `image_as_text`: number of records without an image whose text has `<image>`. `problems`: a line
    for each. `lengths`: of each valid record, with its images. `targets`: number of tokens to train on. `cut`: number of records that the
    limit cuts. `sample`: which records of a stream were read; empty if all were.
    """

    records: int = 0
    images: int = 0
    videos: int = 0
    text_only: int = 0
    image_as_text: int = 0
    problems: list[str] = field(default_factory=list)
    sample: str = ""
    lengths: list[int] = field(default_factory=list)
    targets: int = 0
    cut: int = 0

    def histogram(self) -> dict[str, int]:
        """Return the number of records by length, in powers of two."""
        counts = Counter((length - 1).bit_length() for length in self.lengths)
        return {f"{2 ** (power - 1) + 1}-{2**power}" if power else "1": counts[power] for power in sorted(counts)}

    def padding(self, batch_size: int) -> float:
        """Return the share of padding in batches of `batch_size` that are drawn in the file's order."""
        batches = [self.lengths[start : start + batch_size] for start in range(0, len(self.lengths), batch_size)]
        size = sum(max(batch) * len(batch) for batch in batches)
        return 1 - sum(self.lengths) / size if size else 0.0


def check_data(
    file: str | Path,
    images: str | Path,
    measure: Measure | None = None,
) -> Report:
    """Read every record, or a sample of the records of shards, decode every image once and the video of each record, and return a Report.
    Shards hold their `images`.

    `measure`: returns (ids and labels, whether it was cut) of a record and the sizes of its images, such as `Encoder.measure`, and decodes
    its video. None counts no tokens, and finds no records without targets.

    Raises DataError only if the file itself cannot be read, ShardError if a shard cannot.
    """
    report, sizes = Report(), dict[str, tuple[int, int]]()
    items: Iterable[tuple[str, Any]] = ()
    if streamed := is_stream(file):
        report.sample, items = sample(list(list_shards(str(file))))
    for source, item in with_bar(items if streamed else read_items(file), "checking"):
        report.records += 1
        try:
            record = parse_shard_record(source, item) if streamed else parse_record(source, item, Path(images))
            for path in record.images:
                if str(path) not in sizes:
                    sizes[str(path)] = open_image(path, source).size
            if record.video is not None and measure is None:
                _decode(record.video, source)
            if measure is not None:
                encoded, was_cut = measure(record, [sizes[str(path)] for path in record.images])
                report.cut += was_cut
                report.lengths.append(len(encoded["labels"]))
                report.targets += sum(label >= 0 for label in encoded["labels"])
            report.videos += record.video is not None
            report.text_only += record.token is None
            report.image_as_text += record.token is None and any(IMAGE_TOKEN in text for turn in record.turns for text in turn)
        except DataError as error:
            report.problems.append(str(error))
    report.images = len(sizes)
    return report


def _decode(video: Video, source: str) -> None:
    """Decode each frame of a list, or some frames of a file. Raise DataError if that fails."""
    open_video(video, source, None, (lambda info: range(info.frames)) if isinstance(video, tuple) else uniform)
