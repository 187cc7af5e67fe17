"""Means with 95% intervals: over questions by bootstrap, over runs by Student's t, over both at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

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


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of independent runs, at least two, with Student's 95% interval, n - 1 degrees of freedom. Of paired differences this is the
    interval of the paired t-test."""
    n = len(values)
    half = _half_width(float(np.var(values, ddof=1)) / n, n - 1)
    return Interval(float(np.mean(values)), float(np.mean(values)) - half, float(np.mean(values)) + half, n)


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t-test: of at least such a mean difference if there were none. 1 where there is no difference at all, 0
    where all are the same and not 0."""
    error = float(np.std(differences, ddof=1)) / len(differences) ** 0.5
    mean = float(np.mean(differences))
    if error == 0:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean) / error, len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment for that many tests: the smallest p times their number, the next times one fewer, never falling, at most 1."""
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1)
    return adjusted.tolist()


def crossed_interval(values_SN: np.ndarray, units: Sequence[str]) -> Interval:
    """Mean over S runs that all answered the same N questions, and a 95% interval for other runs and other questions; of runs and units
    there must be at least two.

    Its variance is the sum of two: that of the mean over runs, as in `t_interval`, and that of the mean over questions, of which those of
    one unit count together. What varies by run and question is in both, so the interval is rather too wide than too narrow. Student's t,
    with the degrees of freedom of Satterthwaite (Biometrics Bulletin 2, 1946), which are more than those of the runs alone; but never
    narrower than the interval over runs.
    """
    runs, questions = values_SN.mean(axis=1), values_SN.mean(axis=0)
    sums, counts = _by_group(questions.tolist(), list(units))
    rest = sums - questions.mean() * counts
    parts = [
        (float(np.var(runs, ddof=1)) / len(runs), len(runs) - 1),
        (len(sums) / (len(sums) - 1) * float((rest**2).sum()) / len(questions) ** 2, len(sums) - 1),
    ]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / number for part, number in parts) if variance else 1.0
    half = max(_half_width(variance, freedom), _half_width(*parts[0]))
    mean = float(questions.mean())
    return Interval(mean, mean - half, mean + half, len(questions))


def _half_width(variance: float, freedom: float) -> float:
    """Of a 95% interval of a mean with this variance."""
    return float(stats.t.ppf(0.975, freedom)) * variance**0.5
