"""Open an image, in the same way for training, evaluation, chat and server."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from moe_llava.common.errors import DataError

# Preprocessing pads an image to a square, or enlarges it until its shorter side has a given length. The memory of the first grows with the
# square of the longer side, that of the second with the ratio of the sides. So both are limited.
MOST_RATIO = 200
MOST_SIDE = 6144  # pixels: photographs of 24 megapixels keep their size

# Errors that Pillow may raise for a damaged or hostile file.
BROKEN = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError),
    *(struct.error, Image.DecompressionBombError),
)

ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")  # modes
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageSource(Protocol):
    """An image that is no file of its own. `str` gives its name."""

    def open(self) -> BinaryIO: ...


@dataclass(frozen=True)
class InlineImage:
    """The encoded bytes of an image that is embedded in a question file or a request. `name` identifies it in messages."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name

    def open(self) -> BinaryIO:
        return BytesIO(self.data)


def open_image(image: Path | ImageSource, source: str, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Return an image in RGB, as `to_rgb` does. `formats`: Pillow's names of the formats that are accepted, None for all.

    Raises DataError, naming `source`, if the image is missing or cannot be decoded.
    """
    try:
        with image.open("rb") if isinstance(image, Path) else image.open() as file, Image.open(file, formats=formats) as opened:
            return to_rgb(opened)
    except FileNotFoundError as error:
        raise missing_image(source, image) from error
    except UnidentifiedImageError as error:  # its text holds the address of an object
        known = f"none of {', '.join(formats)}" if formats else "no image format that can be read"
        raise DataError(f"{source} names the image {image}, which cannot be decoded: it is {known}") from error
    except BROKEN as error:
        raise DataError(f"{source} names the image {image}, which cannot be decoded: {error}") from error


def missing_image(source: str, image: Path | ImageSource) -> DataError:
    return DataError(f"{source} names the image {image}, which does not exist")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image in RGB as viewers show it: upright by its EXIF orientation, transparency on white, 16 bits scaled to 8, the
    first frame of an animation. An image with a longer side than MOST_SIDE is reduced to that.

    Raises ValueError if the range of its pixels is undefined, or one side is more than MOST_RATIO times the other.
    """
    check_shape(image.size)
    stored = _stored_as(image)
    image.load()
    _scale_key(image, stored)
    turn = TURNS.get(_orientation(image))  # after loading, because Pillow turns a TIFF itself then
    rgb = _without_alpha(_with_eight_bits(image, stored))
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info.clear()  # orientation and transparency no longer apply
    size = fitting(rgb.size)
    return rgb if size == rgb.size else rgb.resize(size, Image.Resampling.BICUBIC)


def check_shape(size: tuple[int, int]) -> None:
    """Raise ValueError if one side is more than MOST_RATIO times the other."""
    if max(size) > MOST_RATIO * min(size):
        raise ValueError(f"it has {size[0]} x {size[1]} pixels, but one side may be at most {MOST_RATIO} times the other")


def fitting(size: tuple[int, int]) -> tuple[int, int]:
    """Return the size of an image of `size` after `to_rgb`."""
    longest = max(size)
    if longest <= MOST_SIDE:
        return size
    return max(1, round(size[0] * MOST_SIDE / longest)), max(1, round(size[1] * MOST_SIDE / longest))


def _stored_as(image: Image.Image) -> str:
    """Return Pillow's raw mode of an image that is not loaded yet: how its file stores a pixel. Empty if that is unknown."""
    tiles = getattr(image, "tile", None)
    settings: Any = tiles[0][3] if tiles else ""
    return str(settings[0] if isinstance(settings, tuple) and settings else settings)


def _scale_key(image: Image.Image, stored: str) -> None:
    """Scale the transparent value of a PNG without alpha to the 8 bits of the loaded pixels. Pillow does so for one bit only."""
    key = image.info.get("transparency")
    if stored in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2 ** int(stored[-1]) - 1)
    elif stored.startswith("RGB;16") and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except BROKEN:  # with damaged EXIF, viewers show the image as it is stored
        return None


def _with_eight_bits(image: Image.Image, stored: str) -> Image.Image:
    """Return an image of 16-bit grey in 8 bits, its transparent value in white; and other images unchanged.

    Raises ValueError for pixel types that do not define black and white.
    """
    # PNG and PPM files that are loaded as 32-bit integers hold 16 bits.
    if not image.mode.startswith("I;16") and not (image.mode == "I" and image.format in ("PNG", "PPM")):
        if image.mode in ("I", "F"):
            kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
            raise ValueError(f"its pixels are {kind}, for which black and white are not defined; save it with 8 or 16 bits")
        return image
    values_HW = np.asarray(image)
    grey_HW = (values_HW >> (4 if stored == "I;12" else 8)).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey_HW[values_HW == key] = 255
    return Image.fromarray(grey_HW)


def _without_alpha(image: Image.Image) -> Image.Image:
    """Return a copy in RGB, transparency on white."""
    # The colours of a palette may also have alpha.
    if image.mode != "P" and image.mode not in ALPHA and "transparency" not in image.info:
        return image.convert("RGB")
    colours = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    rgb = Image.new("RGB", colours.size, "white")
    rgb.paste(colours, mask=colours)
    return rgb
