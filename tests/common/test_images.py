"""Images in RGB, made by hand or by Pillow, and opened by the function that every entry point uses."""

import json
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from moe_llava.common.errors import DataError
from moe_llava.common.images import MOST_RATIO, MOST_SIDE, TURNS, open_image, to_rgb
from tests.conftest import run_here

ALPHAS = np.array([[0, 1, 128, 200, 255]], np.uint8)
GREY16 = np.array([[0, 255, 256, 0x1234, 0x8000, 65535]], np.uint16)


class Held:
    """Return the bytes of a file."""

    def __init__(self, content):
        self._content = content

    def __str__(self):
        return "held"

    def open(self):
        return BytesIO(self._content)


def opened(content):
    return open_image(Held(content), "test")


def pixels(content):
    image = opened(content)
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(image, kind, **settings):
    file = BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def png(width, depth, colours, row, key=None, palette=b""):
    """A PNG of one row, as its bytes are stored; `key`: the content of its tRNS."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colours, 0, 0, 0))]
    parts += [chunk(b"PLTE", palette)] if palette else []
    parts += [] if key is None else [chunk(b"tRNS", key)]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")])


def on_white(colour, alpha):
    return np.round((colour * alpha.astype(float) + 255 * (255 - alpha.astype(float))) / 255)


# Where each orientation of EXIF has the picture's first row and first column (TIFF 6.0, tag 274), from upright pixels to stored ones.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],
    7: lambda upright: upright.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_upright(orientation, kind):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16], upright[16:, :16] = (255, 0, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    found = pixels(saved(stored, kind, exif=exif, **settings))
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= (12 if kind == "JPEG" else 0)


def test_it_is_turned_only_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = opened(saved(Image.new("RGB", (60, 40)), "JPEG", exif=exif))
    assert image.size == to_rgb(image).size == (40, 60)
    assert not image.getexif()


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0", b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x026\0\0\0"],
)
def test_broken_exif_is_ignored(exif):
    assert opened(saved(Image.new("RGB", (6, 4)), "JPEG", exif=exif)).size == (6, 4)


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_unknown_orientation_is_ignored(value):
    assert value not in TURNS
    exif = Image.Exif()
    exif[0x0112] = value
    assert opened(saved(Image.new("RGB", (6, 4)), "PNG", exif=exif)).size == (6, 4)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "TIFF"), ("RGBA", "WEBP"), ("LA", "TIFF"), ("RGBA", "ICO"), ("RGBA", "TGA")]
)
def test_alpha_is_on_white(mode, kind):
    channels = 3 if mode == "RGBA" else 1
    stored = np.full((16, 5, channels + 1), 60, np.uint8)
    stored[..., -1] = ALPHAS
    image = Image.fromarray(stored, mode).resize((10, 10), Image.Resampling.NEAREST)
    settings = {"WEBP": {"lossless": True, "exact": True}, "ICO": {"sizes": [(10, 10)]}}.get(kind, {})
    expected = np.repeat(on_white(60, ALPHAS[0]), 2)
    assert (pixels(saved(image, kind, **settings)) == expected[None, :, None]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_every_mode_with_alpha(mode):
    """Some modes exist in memory only."""
    stored = Image.fromarray(np.dstack([np.full_like(ALPHAS, 60)] * 3 + [ALPHAS]), "RGBA")
    image = {
        "PA": lambda: stored.convert("P").convert("PA"),
        "RGBa": lambda: stored.convert("RGBa"),
        "La": lambda: stored.convert("LA").convert("La"),
    }.get(mode, lambda: stored.convert(mode))()
    if mode == "PA":
        image.putalpha(Image.fromarray(ALPHAS))
    assert image.mode == mode
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - on_white(60, ALPHAS)[..., None]).max() <= 4


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(2, 1, 0, b"\x40", struct.pack(">H", 0)), [255, 255]),
        (png(4, 2, 0, b"\x1b", struct.pack(">H", 2)), [0, 85, 255, 255]),
        (png(2, 4, 0, b"\x3c", struct.pack(">H", 3)), [255, 204]),
        (png(2, 8, 0, b"\x03\x0c", struct.pack(">H", 3)), [255, 12]),
        (png(3, 16, 0, b"\x80\x00\x80\x01\x12\x34", struct.pack(">H", 0x8000)), [255, 128, 18]),
        (png(2, 8, 2, b"\x03\x03\x03\x0c\x0c\x0c", struct.pack(">HHH", 3, 3, 3)), [255, 12]),
        (png(2, 16, 2, b"\x12\x34" * 3 + b"\x80\x00" * 3, struct.pack(">HHH", *[0x1234] * 3)), [255, 128]),
        (png(3, 8, 3, b"\0\1\2", b"\x00\x80", b"\x05" * 3 + b"\x3c" * 3 + b"\x09" * 3), [255, 157, 9]),
        (saved(Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P"), "GIF", transparency=1), [0, 255]),
    ],
)
def test_a_transparent_value_is_white(content, expected):
    assert pixels(content)[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG2000", "PPM", "I;16", "I;16B", "PNG of two channels", "RGB"])
def test_sixteen_bits_become_eight(form):
    grey = Image.fromarray(GREY16)
    made = {
        "PNG of two channels": lambda: png(6, 16, 4, b"".join(struct.pack(">HH", value, 65535) for value in GREY16[0])),
        "RGB": lambda: png(6, 16, 2, b"".join(struct.pack(">HHH", *[value] * 3) for value in GREY16[0])),
    }
    if form.startswith("I;16"):
        order = "<" if form == "I;16" else ">"
        found = np.asarray(to_rgb(Image.frombytes(form, (6, 1), GREY16.astype(f"{order}u2").tobytes())))
    else:
        found = pixels(made.get(form, lambda: saved(grey, form))())
    assert found[0].tolist() == [[value >> 8] * 3 for value in GREY16[0].tolist()]


@pytest.mark.parametrize(
    ("array", "why"),
    [(np.linspace(0, 1, 6, dtype=np.float32)[None], "floating-point"), (GREY16.astype(np.int32), "32-bit integers")],
)
def test_numbers_without_a_range_are_refused(array, why, tmp_path):
    (tmp_path / "a.tif").write_bytes(saved(Image.fromarray(array), "TIFF"))
    with pytest.raises(DataError, match=f"data, record 3 names the image .*a.tif, which cannot be decoded: its pixels are {why}"):
        open_image(tmp_path / "a.tif", "data, record 3")


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_colours(mode):
    """White, black and a grey keep their values in every mode."""
    plain = Image.fromarray(np.repeat(np.array([[0, 128, 255]], np.uint8)[..., None], 3, axis=2))
    if mode == "LAB":
        image = Image.fromarray(np.array([[[0, 0, 0], [137, 0, 0], [255, 0, 0]]], np.uint8), "LAB")
    else:
        image = plain.quantize() if mode == "P" else plain.convert(mode, dither=Image.Dither.NONE)
    expected = np.array([0, 255, 255] if mode == "1" else [0, 128, 255])
    assert np.abs(np.asarray(to_rgb(image))[0].astype(int) - expected[:, None]).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_photograph_in_cmyk(kind):
    """JPEGs of Adobe hold inverted values."""
    found = pixels(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind))
    assert np.abs(found.astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_of_several(kind):
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "blue", "lime")]
    settings = {"lossless": True} if kind == "WEBP" else {}
    found = pixels(saved(frames[0], kind, save_all=True, append_images=frames[1:], **settings))
    assert np.abs(found.astype(int) - (255, 0, 0)).max() <= (2 if kind == "MPO" else 0)


@pytest.mark.parametrize("size", [(MOST_RATIO * 2 + 1, 2), (3, MOST_RATIO * 3 + 1), (1, 30_000), (60_000, 1)])
def test_a_thin_image_is_refused(size):
    with pytest.raises(DataError, match=f"{size[0]} x {size[1]} pixels, but one side may be at most {MOST_RATIO} times the other"):
        opened(saved(Image.new("L", size), "PNG"))


def test_the_thinnest_image():
    assert opened(saved(Image.new("L", (MOST_RATIO * 2, 2)), "PNG")).size == (400, 2)


@pytest.mark.parametrize(("size", "expected"), [((MOST_SIDE, 40), (MOST_SIDE, 40)), ((80, MOST_SIDE * 2), (40, MOST_SIDE))])
def test_a_long_image_is_made_small(size, expected):
    """This happens before it is padded to a square."""
    half = Image.new("L", size)
    half.paste(255, (0, 0, size[0], size[1] // 2))
    image = opened(saved(half, "PNG"))
    assert image.size == expected
    assert image.getpixel((1, 1)) == (255,) * 3
    assert image.getpixel((1, expected[1] - 2)) == (0,) * 3


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_image_is_named(content):
    with pytest.raises(DataError, match="test names the image held, which cannot be decoded: it is no image format that can be read"):
        opened(content)


def test_the_same_on_the_command_line(tmp_path):
    """`check` names unreadable images, and accepts the others."""
    images = {
        "thin.png": saved(Image.new("L", (1, 30_000)), "PNG"),
        "float.tif": saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
        "grey16.png": saved(Image.fromarray(GREY16), "PNG"),
    }
    for name, content in images.items():
        (tmp_path / name).write_bytes(content)
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "here"}]
    records = [{"id": name, "image": name, "conversations": turns} for name in images]
    (tmp_path / "data.json").write_text(json.dumps(records))
    told = run_here("check", tmp_path / "data.json", "--images", tmp_path)
    assert told.exit_code == 1
    assert "1 x 30000 pixels" in told.stdout
    assert "floating-point numbers" in told.stdout
    assert "grey16" not in told.stdout
