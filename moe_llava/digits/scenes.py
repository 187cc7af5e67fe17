"""Scenes of handwritten digits: content, picture, description.

The handwriting is real: the 1,797 scans of 8x8 pixels that scikit-learn ships (UCI, "Optical Recognition of Handwritten Digits"). A scene
holds at most one digit per cell of a 3x3 grid, and no two digits with equal value and colour, so that "the red 7" is unique.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "test"]

COLOURS = {
    "red": (235, 60, 50),
    "green": (60, 200, 80),
    "blue": (60, 120, 255),
    "yellow": (250, 220, 60),
    "pink": (255, 120, 210),
    "white": (240, 240, 240),
}
POSITIONS = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
GRID = 3
CELL = 16  # pixels
CANVAS = GRID * CELL
MAX_DIGITS = 4
FAVOURITE_SHARE = 0.3  # of the digits have their favourite colour
TEST_SHARE = 4  # every fourth scan is kept for testing


@dataclass(frozen=True)
class Item:
    """One digit of a scene: its value 0..9, its colour, and its cell 0..8 in reading order."""

    digit: int
    colour: str
    cell: int

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID

    @property
    def position(self) -> str:
        return POSITIONS[self.cell]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.digit}"


@dataclass(frozen=True)
class Scene:
    """Items in reading order (top-left to bottom-right)."""

    items: tuple[Item, ...]

    @property
    def caption(self) -> str:
        return " and ".join(f"a {item.name} at the {item.position}" for item in self.items)


def favourite_colour(digit: int) -> str:
    """Return the most frequent colour of `digit`, which "popular" negatives ask for."""
    return list(COLOURS)[digit % len(COLOURS)]


def sample_scene(rng: random.Random, max_digits: int = MAX_DIGITS, min_digits: int = 1) -> Scene:
    """Draw a scene of `min_digits` to `max_digits` digits."""
    cells = sorted(rng.sample(range(GRID * GRID), rng.randint(min_digits, max_digits)))
    items: list[Item] = []
    taken: set[tuple[int, str]] = set()
    for cell in cells:
        while True:
            digit = rng.randrange(10)
            colour = favourite_colour(digit) if rng.random() < FAVOURITE_SHARE else rng.choice(list(COLOURS))
            if (digit, colour) not in taken:
                break
        taken.add((digit, colour))
        items.append(Item(digit, colour, cell))
    return Scene(tuple(items))


@cache
def handwriting(split: Split) -> dict[int, np.ndarray]:
    """Return the scans of one split: digit -> [N, 8, 8] float32 in 0..1. No scan is in both splits."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    is_test = np.arange(len(scans.target)) % TEST_SHARE == 0
    chosen = is_test if split == "test" else ~is_test
    images = (scans.images / 16.0).astype(np.float32)
    return {digit: images[chosen & (scans.target == digit)] for digit in range(10)}


def render(scene: Scene, rng: random.Random, split: Split) -> Image.Image:
    """Draw `scene` as an RGB picture of 48x48 pixels with handwriting of `split`: each digit slightly rotated, scaled and shifted, on a
    dark background of random colour with noise."""
    noise_rng = np.random.default_rng(rng.getrandbits(32))
    canvas_HWC = np.empty((CANVAS, CANVAS, 3), np.float32)
    canvas_HWC[:] = [rng.uniform(0, 70) for _ in range(3)]
    for item in scene.items:
        ink_HW1 = _draw_ink(rng.choice(handwriting(split)[item.digit]), rng)[..., None]
        top, left = item.row * CELL, item.column * CELL
        patch = canvas_HWC[top : top + CELL, left : left + CELL]
        colour = np.array(COLOURS[item.colour], np.float32) * rng.uniform(0.85, 1.0)
        patch += ink_HW1 * (colour - patch)
    canvas_HWC += noise_rng.normal(0, 6, canvas_HWC.shape)
    return Image.fromarray(canvas_HWC.clip(0, 255).astype(np.uint8))


def _draw_ink(scan_HW: np.ndarray, rng: random.Random) -> np.ndarray:
    """Return the coverage [CELL, CELL] in 0..1 of a scan [8, 8], after a small random rotation, scaling and shift."""
    angle = np.deg2rad(rng.uniform(-12, 12))
    step = 8 / (CELL * rng.uniform(0.82, 0.98))  # source pixels per target pixel
    cos, sin = np.cos(angle) * step, np.sin(angle) * step
    centre_x, centre_y = CELL / 2 + rng.uniform(-1, 1), CELL / 2 + rng.uniform(-1, 1)
    matrix = (cos, sin, 4 - cos * centre_x - sin * centre_y, -sin, cos, 4 + sin * centre_x - cos * centre_y)
    warped = Image.fromarray(scan_HW).transform((CELL, CELL), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.asarray(warped).clip(0, 1)
