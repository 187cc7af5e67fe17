"""Means with 95% intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
MEASURED = 1000  # resamples where a score has to be computed anew for each


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


def bootstrap(
    measure: Callable[[np.ndarray], dict[str, float]], units: Sequence[str], strata: Sequence[str] | None = None, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95% percentile interval of every score that `measure` gives, from the weight [N] of each item. Items of one unit are drawn together:
    a resample's weights say how often each unit was drawn. Of each stratum of units as many are drawn as it has. A resample for which a
    score is NaN, as it holds nothing of what is scored, does not count for it."""
    names, first, index = np.unique(np.asarray(units, dtype=str), return_index=True, return_inverse=True)
    if not len(names):
        return {}
    stratum = np.zeros(len(names)) if strata is None else np.asarray(strata)[first]
    members = [np.flatnonzero(stratum == name) for name in np.unique(stratum)]
    random = np.random.default_rng(seed)
    scores = []
    for _ in range(MEASURED):
        chosen = np.concatenate([places[random.integers(len(places), size=len(places))] for places in members])
        drawn = np.bincount(chosen, minlength=len(names))
        scores.append(measure(drawn[index].astype(float)))
    low, high = np.nanquantile([list(score.values()) for score in scores], [0.025, 0.975], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(scores[0], low, high, strict=True)}
