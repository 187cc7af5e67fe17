"""Open an image: the one way for training, evaluation, chat and server."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Protocol

from PIL import Image

from moe_llava.common.errors import DataError


class ImageSource(Protocol):
    """An image that is no file of its own; its name is what `str` gives."""

    def open(self) -> BinaryIO: ...


def open_image(image: Path | ImageSource, source: str, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Decodes an image to RGB; of one of `formats`, as Pillow names them, where they are given. Raises DataError, naming `source`, if that
    cannot be done."""
    try:
        with image.open("rb") if isinstance(image, Path) else image.open() as file, Image.open(file, formats=formats) as opened:
            return opened.convert("RGB")
    except FileNotFoundError as error:
        raise missing_image(source, image) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{source} names the image {image}, which cannot be decoded: {error}") from error


def missing_image(source: str, image: Path | ImageSource) -> DataError:
    return DataError(f"{source} names the image {image}, which does not exist")
