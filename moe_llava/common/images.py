"""Open an image: the one way for training, evaluation, chat and server."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from moe_llava.common.errors import DataError

# Preprocessing pads an image to a square, or enlarges it until its shorter side has a given length. Its memory grows with the square of the
# longer side in the first case, with the ratio of the sides in the second. So both have a bound.
MOST_RATIO = 200
MOST_SIDE = 6144  # pixels: photographs of 24 megapixels keep each of theirs

# What Pillow may raise for a file that is damaged or hostile.
BROKEN = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError),
    *(struct.error, Image.DecompressionBombError),
)

ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")  # modes
ORIENTATION = 0x0112  # the tag of EXIF
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
    """An image that is no file of its own; its name is what `str` gives."""

    def open(self) -> BinaryIO: ...


def open_image(image: Path | ImageSource, source: str, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Decode an image to RGB as `to_rgb` does; of one of `formats`, as Pillow names them, where they are given. Raises DataError, naming
    `source`, if that cannot be done."""
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
    """Return an opened image as viewers show it, in RGB: upright by its EXIF orientation, transparency on white, 16 bits scaled to 8, the
    first frame of an animation. The longer side becomes at most MOST_SIDE.

    Raises ValueError if its pixels have no defined range, or one side is more than MOST_RATIO times the other.
    """
    check_shape(image.size)
    stored = _stored_as(image)
    image.load()
    _scale_key(image, stored)
    turn = TURNS.get(_orientation(image))  # asked after loading: a TIFF turns itself then
    rgb = _without_alpha(_with_eight_bits(image, stored))
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info.clear()  # nothing there is true any more: not the orientation, not the transparency
    size = fitting(rgb.size)
    return rgb if size == rgb.size else rgb.resize(size, Image.Resampling.BICUBIC)


def check_shape(size: tuple[int, int]) -> None:
    """Raises ValueError if one side is more than MOST_RATIO times the other."""
    if max(size) > MOST_RATIO * min(size):
        raise ValueError(f"it has {size[0]} x {size[1]} pixels, but one side may be at most {MOST_RATIO} times the other")


def fitting(size: tuple[int, int]) -> tuple[int, int]:
    """The size to which `to_rgb` makes an image of `size` smaller."""
    longest = max(size)
    if longest <= MOST_SIDE:
        return size
    return max(1, round(size[0] * MOST_SIDE / longest)), max(1, round(size[1] * MOST_SIDE / longest))


def _stored_as(image: Image.Image) -> str:
    """Pillow's raw mode: how the file of an image that is not loaded yet stores a pixel. Empty if that is unknown."""
    tiles = getattr(image, "tile", None)
    settings: Any = tiles[0][3] if tiles else ""
    return str(settings[0] if isinstance(settings, tuple) and settings else settings)


def _scale_key(image: Image.Image, stored: str) -> None:
    """Bring the transparent value of a PNG without alpha to the 8 bits of the loaded pixels, which Pillow does for one bit only."""
    key = image.info.get("transparency")
    if stored in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2 ** int(stored[-1]) - 1)
    elif stored.startswith("RGB;16") and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except BROKEN:  # damaged EXIF says nothing; viewers show the picture as it is stored
        return None


def _with_eight_bits(image: Image.Image, stored: str) -> Image.Image:
    """An image of 16-bit grey in 8 bits; its transparent value becomes white. Others stay as they are.

    Raises ValueError for numbers of which nothing says what is black and what is white.
    """
    # Of files with 32-bit integers, these two hold 16 bits.
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
    """A copy in RGB, transparency on white."""
    # The colours of a palette may have alpha, too.
    if image.mode != "P" and image.mode not in ALPHA and "transparency" not in image.info:
        return image.convert("RGB")
    colours = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    rgb = Image.new("RGB", colours.size, "white")
    rgb.paste(colours, mask=colours)
    return rgb
