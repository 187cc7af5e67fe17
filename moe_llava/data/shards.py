"""Read the records of shards: Parquet files and tar files in the layout of WebDataset, on a disk or anywhere that fsspec reads from.

A shard is read from its beginning to its end, and never copied. `datasets` is not used for this: it resumes a shuffled stream with an empty
buffer, so other records follow; its tar reader wants the same files in every sample, and ends at the first JSON that it cannot read.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec
import pyarrow.parquet as pq

from moe_llava.common.errors import DataError
from moe_llava.common.images import InlineImage
from moe_llava.data.files import IMAGE_KEYS, SHARDS, load_item
from moe_llava.data.records import Record, image_names, parse_record

ROWS = 32  # that are taken from a Parquet file at once
BUFFER = 1 << 20  # bytes: without it, the columns of a whole row group are read at once
PICTURES = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")  # ends of names in a tar file
SAMPLED_SHARDS, SAMPLED_RECORDS = 10, 100  # of a sample: shards, and records of each

Item = tuple[int, str, Any]  # number of a record in its shard, source, raw record or DataError


class ShardError(OSError):
    """A shard cannot be read any further. That is no bad record: nothing says which records are lost."""


def list_shards(pattern: str) -> dict[str, int | None]:
    """Return the shards that a path or URL names, which may have wildcards, in the order of their names, with their sizes in bytes if these
    are known.

    Raises DataError if there is none, if one is neither Parquet nor tar, or if they cannot be listed.
    """
    try:
        system, path = fsspec.url_to_fs(pattern)
        found = system.glob(path, detail=True)
        shards = {system.unstrip_protocol(name) if "://" in pattern else name: found[name].get("size") for name in sorted(found)}
    except Exception as error:  # file systems have errors of their own
        raise DataError(f"shards {pattern} cannot be listed: {error}") from error
    if not shards:
        raise DataError(f"shards {pattern} do not exist")
    for name in shards:
        if not name.endswith(SHARDS):
            raise DataError(f"{name} is no shard: its name must end in {' or '.join(SHARDS)}")
    return shards


def read_shard(shard: str, start: int = 0) -> Iterator[Item]:
    """Yield the records of a shard from number `start` on. A record that cannot be read is a DataError.

    Raises ShardError, naming the shard and the last record before, if the shard cannot be read.
    """
    number = start - 1
    try:
        with fsspec.open(shard, "rb") as file:
            for number, source, item in (_read_rows if shard.endswith(".parquet") else _read_samples)(shard, file, start):
                yield number, source, item
    except Exception as error:  # see list_shards
        where = f"after record {number}" if number >= 0 else "from its beginning"
        raise ShardError(f"shard {shard} cannot be read {where}: {error}") from error


def parse_shard_record(source: str, item: Any) -> Record:
    """Return the Record of an item of `read_shard`. Raises DataError as `parse_record` does, or if the shard does not hold its media."""
    record = parse_record(source, item, Path())
    if record.files:
        raise DataError(f"{source} names the file {record.files[0]}, which is not in its shard, but shards must hold their images")
    return record


def sample(shards: list[str]) -> tuple[str, Iterator[tuple[str, Any]]]:
    """Return (a description, (source, raw record) of the first SAMPLED_RECORDS of each of SAMPLED_SHARDS shards, evenly spread)."""
    number = min(len(shards), SAMPLED_SHARDS)
    chosen = [shards[index * len(shards) // number] for index in range(number)]
    text = f"a sample: at most {SAMPLED_RECORDS} records from the beginning of {number:,} of {len(shards):,} shards"
    return text, ((source, item) for shard in chosen for _, source, item in islice(read_shard(shard), SAMPLED_RECORDS))


def _read_rows(shard: str, file: BinaryIO, start: int) -> Iterator[Item]:
    """Read a Parquet file. Row groups before `start` are skipped without being read."""
    table = pq.ParquetFile(file, buffer_size=BUFFER)
    row, groups = 0, list(range(table.num_row_groups))
    while groups and row + (size := table.metadata.row_group(groups[0]).num_rows) <= start:
        row, groups = row + size, groups[1:]
    for batch in table.iter_batches(ROWS, row_groups=groups):
        skipped = min(max(0, start - row), batch.num_rows)
        for number, values in enumerate(batch.slice(skipped).to_pylist(), start=row + skipped):
            source = f"row {number} of {shard}"
            item = {key: value for key, value in values.items() if value is not None}
            item |= {key: _images_of(item[key], source) for key in IMAGE_KEYS if key in item}
            yield number, source, item
        row += batch.num_rows


def _images_of(column: Any, source: str) -> list[Any]:
    """Return the images of a row: bytes, or the mapping with bytes or path of `datasets`, or a list of these."""
    values = column if isinstance(column, list) else [column]
    values = [value.get("bytes") or value.get("path") if isinstance(value, dict) else value for value in values]
    return [InlineImage(f"{number} of {source}", value) if isinstance(value, bytes) else value for number, value in enumerate(values)]


def _read_samples(shard: str, file: BinaryIO, start: int) -> Iterator[Item]:
    """Read a tar file. Neighbours with the same name up to the first dot are a sample."""
    number, key, files = -1, None, dict[str, bytes]()
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            stem, dot, _ = path.name.partition(".")
            if not member.isfile() or not stem or not dot:
                continue
            if (now := str(path.with_name(stem))) != key:
                if files:
                    yield _sample_of(number, str(key), shard, files)
                number, key, files = number + 1, now, {}
            if number >= start:
                files[path.name] = archive.extractfile(member).read()  # type: ignore[union-attr]
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile takes a damaged or missing header for the end
            raise tarfile.ReadError(f"byte {archive.offset} is neither the header of a file nor the end of the archive")
    if files:
        yield _sample_of(number, str(key), shard, files)


def _sample_of(number: int, key: str, shard: str, files: Mapping[str, bytes]) -> Item:
    """Return a sample, whose images are those that its JSON names, or if it names none, all of them."""
    source = f"sample {key} of {shard}"
    texts = [name for name in files if name.endswith(".json")]
    if len(texts) != 1:
        return number, source, DataError(f"{source} must have one .json, but has {', '.join(files)}")
    item = load_item(source, files[texts[0]])
    pictures = {
        name: InlineImage(f"{name} of {shard}", data) for name, data in files.items() if name.lower().rpartition(".")[2] in PICTURES
    }
    if isinstance(item, dict) and pictures:
        names = image_names(item) or list(pictures)
        images = [pictures.get(PurePosixPath(name).name, name) if isinstance(name, str) else name for name in names]
        item = {key: value for key, value in item.items() if key not in IMAGE_KEYS} | {IMAGE_KEYS[0]: images}
    return number, source, item
