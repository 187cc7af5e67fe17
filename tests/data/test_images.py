"""Image preprocessing against the recorded pictures, to the bit.

The original drops alpha and keeps the colours beneath it, which nobody sees. Here transparency is white. So the recorded picture with alpha
checks the preprocessing alone, from those colours; the other six are opened as every entry point opens them.
"""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaImageProcessorPil

from moe_llava.common.images import open_image


@pytest.mark.parametrize("pad", ["pad", "nopad"])
@pytest.mark.parametrize("name", ["clip56", "clip336"])
def test_pictures_equal_the_recorded_after_resize_and_crop(golden, name, pad):
    settings = json.loads((golden / "images" / "meta.json").read_text())["processors"][name]
    arguments = {key: settings[key] for key in ("size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std")}
    processor = LlavaImageProcessorPil(**arguments, do_pad=pad == "pad")
    compared = 0
    for file in sorted((golden / "images" / "processed").glob(f"{name}.{pad}.*.png")):
        source = golden / "images" / f"{file.name.split('.')[2]}.png"
        image = Image.open(source).convert("RGB") if source.stem == "rgba" else open_image(source, "test")
        found = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        expected = np.asarray(Image.open(file)).transpose(2, 0, 1)
        assert np.array_equal(found, expected), file.name
        normalised = processor(image, return_tensors="np")["pixel_values"][0]
        mean, std = (np.array(settings[key], dtype=np.float32)[:, None, None] for key in ("image_mean", "image_std"))
        np.testing.assert_allclose(normalised, (expected.astype(np.float32) / 255 - mean) / std, atol=1e-6)
        compared += 1
    assert compared == 7


def test_the_recorded_picture_with_alpha_is_on_white(golden):
    with Image.open(golden / "images" / "rgba.png") as stored:
        colours_HW3, alpha_HW1 = np.split(np.asarray(stored, dtype=float), [3], axis=2)
    assert alpha_HW1.min() == 0
    found = np.asarray(open_image(golden / "images" / "rgba.png", "test"))
    assert np.array_equal(found, np.round((colours_HW3 * alpha_HW1 + 255 * (255 - alpha_HW1)) / 255))
