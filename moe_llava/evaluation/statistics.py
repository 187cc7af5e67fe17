"""Means with 95% intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap_mean(values: list[float], groups: list[str], seed: int = 0) -> Interval:
    """The mean of `values` and its percentile interval over resampled groups.

    Values of one group (the questions about one image) are not independent, so whole groups are drawn.
    """
    sums, counts = _by_group(values, groups)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean(values)), float(low), float(high), len(values))


def _by_group(values: list[float], groups: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each group."""
    _, index = np.unique(groups, return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index)
