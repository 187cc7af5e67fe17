"""Colours of experts and of the lines of a chart."""

from __future__ import annotations

# The palette of Okabe and Ito, which people with colour vision deficiency can tell apart.
EXPERT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def expert_colour(expert: int) -> str:
    """Return the colour of an expert. Colours repeat after eight, so plots of tokens also show numbers."""
    return EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]


def ink(colour: str) -> str:
    """Return black or white, whichever is easier to read on `colour` (W3C's relative luminance)."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if luminance > 0.179 else "white"
