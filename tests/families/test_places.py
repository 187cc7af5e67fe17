"""The patches of an image are found in the picture: those of each quadrant have its colour."""

import pytest
import torch
from PIL import Image

from moe_llava import upcycle
from moe_llava.data.encoder import Encoder
from moe_llava.data.records import Record
from moe_llava.data.rendering import make_portable
from moe_llava.routing.page import as_seen
from moe_llava.routing.tokens import picture_sizes, tiles
from moe_llava.routing.trace import trace_routing
from tests.families.processors import ROWS, tiny_model, tiny_processor

COLOURS = ((250, 20, 20), (20, 250, 20), (20, 20, 250), (240, 240, 30))


@pytest.fixture
def quadrants(tmp_path):
    image = Image.new("RGB", (64, 32))
    for number, colour in enumerate(COLOURS):
        image.paste(colour, (32 * (number % 2), 16 * (number // 2), 32 * (number % 2) + 32, 16 * (number // 2) + 16))
    image.save(tmp_path / "quadrants.png")
    return Record("quadrants", (("<image>\nWhat?", "Four."),), (tmp_path / "quadrants.png",))


def made(family):
    processor = tiny_processor(family)
    portable = make_portable(processor.chat_template, processor.tokenizer, processor.image_token)
    processor.chat_template = processor.tokenizer.chat_template = portable
    return upcycle(tiny_model(family, processor), num_experts=4, num_experts_per_tok=2), processor


@pytest.mark.parametrize("family", sorted(ROWS))
def test_patches_are_where_their_pixels_are(family, quadrants):
    """The picture of the page has the colours of the image, and a token's place is that of the pixels that it was made from."""
    model, processor = made(family)
    item = Encoder(processor)(quadrants)
    batch = {name: value[None] if name in ("input_ids", "labels") or name.endswith("type_ids") else value for name, value in item.items()}
    trace = trace_routing(model, batch, processor.tokenizer)
    pictures = as_seen(batch, processor, model.config)
    places = trace.places_T3[trace.places_T3[:, 0] >= 0]
    assert len(pictures) == int(places[:, 0].max()) + 1
    for number, picture in enumerate(pictures):
        own = places[places[:, 0] == number]
        rows, columns = int(own[:, 1].max()) + 1, int(own[:, 2].max()) + 1
        assert len(own) - (own[:, 1] < 0).sum() == rows * columns
        assert picture.shape[0] % rows == 0
        assert picture.shape[1] % columns == 0
    if picture_sizes(batch, model.config) is None:
        return  # images of one size: the order of their patches is that of a convolution
    (picture,) = pictures
    for row, column, colour in ((0, 0, 0), (0, -1, 1), (-1, 0, 2), (-1, -1, 3)):
        assert abs(picture[row, column] * 255 - COLOURS[colour]).max() < 12
    if "image_grid_thw" in batch:
        mean, std = (torch.tensor(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
        patches = batch["pixel_values"].view(len(own), 4, 3, -1).mean((1, 3)) * std + mean
        for place, colour in zip(own.tolist(), patches, strict=True):
            quadrant = 2 * (place[1] >= rows / 2) + (place[2] >= columns / 2)
            if rows % 2 == 0 and columns % 2 == 0:
                assert (colour * 255 - torch.tensor(COLOURS[quadrant])).abs().max() < 12


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_places_of_tiles_that_the_model_arranges(family, tmp_path):
    """The whole picture comes first; then rows go through two tiles beside each other, and end with a newline."""
    Image.new("RGB", (64, 20), COLOURS[0]).save(tmp_path / "wide.png")
    model, processor = made(family)
    item = Encoder(processor)(Record("wide", (("<image>\nWhat?", "Red."),), (tmp_path / "wide.png",)))
    batch = {name: value[None] if name in ("input_ids", "labels") else value for name, value in item.items()}
    places = trace_routing(model, batch, processor.tokenizer).places_T3
    whole = [[0, row, column] for row in (0, 1) for column in (0, 1)]
    rows = [[*([tile, row, column] for tile in (1, 2) for column in (0, 1)), [0, -1, -1]] for row in (0, 1)]
    assert places[places[:, 0] >= 0].tolist() == [*whole, *rows[0], *rows[1]]


def test_empty_tiles_are_left_out():
    pixels = torch.zeros(2, 3, 3, 4, 4)
    pixels[0, :2], pixels[1, 0] = 1, 2
    assert tiles(pixels).flatten(1).mean(1).tolist() == [1, 1, 2]
