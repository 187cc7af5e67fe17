import random

import numpy as np
import pytest

from moe_llava.digits.scenes import COLOURS, FAVOURITE_SHARE, STANDARD, handwriting, render, sample_scene


def scenes(number, seed=0):
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(number)]


def test_no_handwriting_is_in_both_splits():
    def scans(split):
        return {scan.tobytes() for group in handwriting(split).values() for scan in group}

    train, test = (sum(len(group) for group in handwriting(split).values()) for split in ("train", "test"))
    assert train + test == 1797
    assert 0.2 < test / 1797 < 0.3
    # The collection has no scan twice, so disjoint pictures are disjoint samples.
    assert len(scans("train")) == train
    assert not scans("train") & scans("test")
    assert all(len(handwriting("test")[digit]) > 30 for digit in range(10))


def test_scenes_have_one_to_four_digits_that_differ():
    drawn = scenes(400)
    assert {len(scene.items) for scene in drawn} == set(range(1, 5))
    for scene in drawn:
        assert len({item.name for item in scene.items}) == len(scene.items)
        cells = [item.cell for item in scene.items]
        assert cells == sorted(set(cells))


def test_digits_wear_their_favourite_colour_more_often():
    items = [item for scene in scenes(2000) for item in scene.items]
    share = np.mean([item.colour == STANDARD.favourite_colour(item.digit) for item in items])
    assert share == pytest.approx(FAVOURITE_SHARE + (1 - FAVOURITE_SHARE) / len(COLOURS), abs=0.03)


def test_caption():
    scene = scenes(1, seed=3)[0]
    assert scene.caption.count(" and ") == len(scene.items) - 1
    assert all(f"a {item.colour} {item.digit} at the {item.position}" in scene.caption for item in scene.items)


def test_pictures_show_the_colour_where_the_digit_is():
    rng = random.Random(0)
    for scene in scenes(30):
        pixels = np.asarray(render(scene, rng, "test")).astype(float)
        assert pixels.shape == (48, 48, 3)
        for cell in range(9):
            row, column = divmod(cell, 3)
            patch = pixels[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].reshape(-1, 3)
            item = next((item for item in scene.items if item.cell == cell), None)
            if item is None:
                assert patch.max() < 120
            else:
                brightest = patch[patch.sum(1).argmax()]
                nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - brightest).sum())
                assert nearest == item.colour


def test_the_same_seed_draws_the_same():
    scene = scenes(1)[0]
    assert render(scene, random.Random(5), "train").tobytes() == render(scene, random.Random(5), "train").tobytes()
    assert render(scene, random.Random(5), "train").tobytes() != render(scene, random.Random(6), "train").tobytes()
