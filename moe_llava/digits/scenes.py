"""Scenes of handwritten digits: content, picture, description.

The handwriting is real: the 1,797 scans of 8x8 pixels that scikit-learn ships (UCI, "Optical Recognition of Handwritten Digits"). A scene
holds at most one digit per cell of a grid, and no two digits with equal value and colour, so that "the red 7" is unique. A level says how
large the grid is, and how many digits and colours there are.
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
MORE_COLOURS = {"orange": (255, 140, 30), "purple": (150, 70, 230), "cyan": (60, 220, 230)}  # of the level "hard"
RGB = COLOURS | MORE_COLOURS
POSITIONS = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
CELL = 16  # pixels
FAVOURITE_SHARE = 0.3  # of the digits have their favourite colour
TEST_SHARE = 4  # every fourth scan is kept for testing


@dataclass(frozen=True)
class Level:
    """How hard scenes are. `grid`: cells per side. `digits`: the fewest and the most of a scene. `positions`: the name of each cell, in
    reading order, one token each. `at`: the words before it."""

    name: str
    grid: int
    digits: tuple[int, int]
    colours: tuple[str, ...]
    positions: tuple[str, ...]
    at: str

    @property
    def canvas(self) -> int:
        """The side of a picture, in pixels."""
        return self.grid * CELL

    def favourite_colour(self, digit: int) -> str:
        """Return the most frequent colour of `digit`, which "popular" negatives ask for."""
        return self.colours[digit % len(self.colours)]


STANDARD = Level("standard", 3, (1, 4), tuple(COLOURS), POSITIONS, "at the")
HARD = Level("hard", 4, (3, 6), tuple(RGB), tuple(f"{column}{row}" for row in "1234" for column in "abcd"), "at")
LEVELS = {level.name: level for level in (STANDARD, HARD)}


@dataclass(frozen=True)
class Item:
    """One digit of a scene: its value 0..9, its colour, and its cell in reading order, from 0."""

    digit: int
    colour: str
    cell: int
    level: Level = STANDARD

    @property
    def row(self) -> int:
        return self.cell // self.level.grid

    @property
    def column(self) -> int:
        return self.cell % self.level.grid

    @property
    def position(self) -> str:
        return self.level.positions[self.cell]

    @property
    def place(self) -> str:
        return f"{self.level.at} {self.position}"

    @property
    def name(self) -> str:
        return f"{self.colour} {self.digit}"


@dataclass(frozen=True)
class Scene:
    """Items in reading order (top-left to bottom-right): at least one, all of one level."""

    items: tuple[Item, ...]

    @property
    def level(self) -> Level:
        return self.items[0].level

    @property
    def caption(self) -> str:
        return " and ".join(f"a {item.name} {item.place}" for item in self.items)


def sample_scene(rng: random.Random, level: Level = STANDARD, digits: tuple[int, int] | None = None) -> Scene:
    """Draw a scene of the fewest to the most `digits`, by default the level's."""
    cells = sorted(rng.sample(range(level.grid**2), rng.randint(*(digits or level.digits))))
    items: list[Item] = []
    taken: set[tuple[int, str]] = set()
    for cell in cells:
        while True:
            digit = rng.randrange(10)
            colour = level.favourite_colour(digit) if rng.random() < FAVOURITE_SHARE else rng.choice(level.colours)
            if (digit, colour) not in taken:
                break
        taken.add((digit, colour))
        items.append(Item(digit, colour, cell, level))
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
    """Draw `scene` as an RGB picture with handwriting of `split`: each digit slightly rotated, scaled and shifted, on a dark background of
    random colour with noise. Its side is the canvas of the level."""
    noise_rng = np.random.default_rng(rng.getrandbits(32))
    canvas_HWC = np.empty((scene.level.canvas, scene.level.canvas, 3), np.float32)
    canvas_HWC[:] = [rng.uniform(0, 70) for _ in range(3)]
    for item in scene.items:
        ink_HW1 = _draw_ink(rng.choice(handwriting(split)[item.digit]), rng)[..., None]
        top, left = item.row * CELL, item.column * CELL
        patch = canvas_HWC[top : top + CELL, left : left + CELL]
        colour = np.array(RGB[item.colour], np.float32) * rng.uniform(0.85, 1.0)
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
