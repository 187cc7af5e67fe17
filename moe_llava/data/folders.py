"""Reads folders of Hugging Face `datasets`, and Parquet files.

`datasets` takes a second to import and few data need it, so it is imported where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from moe_llava.common.errors import DataError

if TYPE_CHECKING:
    import datasets

IMAGE_KEYS = ("image", "images")


@dataclass(frozen=True)
class StoredImage:
    """An image that stands in a row of a `datasets` folder, rather than in a file of its own."""

    folder: Path
    row: int
    number: int

    def __str__(self) -> str:
        return f"{self.number} of row {self.row} of {self.folder}"

    def open(self) -> BinaryIO:
        value = image_values(self.folder, self.row)[self.number]
        return BytesIO(value["bytes"]) if value["bytes"] is not None else Path(value["path"]).open("rb")


def read_folder(folder: Path) -> Iterator[tuple[str, Any]]:
    """Rows, without reading the images in them."""
    import datasets

    table = open_folder(folder)
    stored = [key for key in IMAGE_KEYS if key in table.column_names and _holds_images(table.features[key])]
    row = 0
    for batch in table.with_format("arrow").iter(1000):
        rows = batch.drop_columns(stored).to_pylist()
        for key in stored:
            for place, there in enumerate(_images_there(batch[key], isinstance(table.features[key], datasets.Image))):
                images = [StoredImage(folder, row + place, index) if given else None for index, given in enumerate(there)]
                rows[place][key] = images if any(there) else []
        for item in rows:
            yield f"row {row} of {folder}", {key: value for key, value in item.items() if value is not None}
            row += 1
    if not row:
        raise DataError(f"{folder} must hold at least one record, but its table is empty")


def _images_there(column: Any, single: bool) -> list[list[bool]]:
    """For each row of a table's column whether each of its images has bytes or a path, without reading the bytes."""
    import pyarrow.compute as pc

    images = column if single else pc.list_flatten(column)
    rows = range(len(column)) if single else pc.list_parent_indices(column).to_pylist()
    named = pc.fill_null(pc.greater(pc.utf8_length(pc.struct_field(images, "path")), 0), False)
    given = pc.or_(pc.is_valid(pc.struct_field(images, "bytes")), named)
    there: list[list[bool]] = [[] for _ in range(len(column))]
    for row, value in zip(rows, given.to_pylist(), strict=True):
        there[row].append(value)
    return there


def image_values(folder: Path, row: int) -> list[dict[str, Any]]:
    """`bytes`, or else `path`, of each image in a row."""
    values = open_folder(folder)[row]
    columns = [values[key] if isinstance(values[key], list) else [values[key]] for key in IMAGE_KEYS if values.get(key)]
    return next(column for column in columns if any(image and (image["bytes"] is not None or image["path"]) for image in column))


def _holds_images(feature: Any) -> bool:
    import datasets

    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def _load_parquet(path: Path) -> datasets.Dataset:
    import datasets

    if path.is_file():
        return datasets.load_dataset("parquet", data_files=str(path.absolute()), split="train")
    return datasets.load_dataset(str(path.absolute()), split="train")  # a relative name may be that of one of its modules


@lru_cache(maxsize=8)
def open_folder(folder: Path) -> datasets.Dataset:
    """The table of a folder that `save_to_disk` wrote, or the split "train" of one with Parquet or Arrow files, or a Parquet file; images
    undecoded.

    Raises DataError if it is neither.
    """
    import datasets

    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise DataError(f"{folder} holds several tables: name one of {', '.join(str(folder / split) for split in splits)}")
    saved = (folder / "state.json").is_file()
    try:
        table = datasets.load_from_disk(folder) if saved else _load_parquet(folder)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{folder} is no folder of `datasets`: {error}") from error
    for key in IMAGE_KEYS:
        if key in table.column_names and _holds_images(table.features[key]):
            raw = datasets.Image(decode=False)
            table = table.cast_column(key, raw if isinstance(table.features[key], datasets.Image) else datasets.List(raw))
    return table
