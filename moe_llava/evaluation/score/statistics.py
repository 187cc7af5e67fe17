"""Means with 95% intervals: over questions by bootstrap, over runs by Student's t, and over both at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

RESAMPLES = 2000
MEASURED = 1000  # resamples if each needs a call of `measure`
ROUNDING = 1e-12  # differences of shares that are no larger are rounding errors


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap_mean(values: list[float], groups: list[str], seed: int = 0) -> Interval:
    """Return the mean of `values` and its percentile interval over resampled groups.

    Values of one group (the questions about one image) are not independent, so whole groups are drawn.
    """
    sums, counts = _by_group(values, groups)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean(values)), float(low), float(high), len(values))


def _by_group(values: list[float], groups: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of the values of each group."""
    _, index = np.unique(groups, return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index)


def bootstrap(
    measure: Callable[[np.ndarray], dict[str, float]], units: Sequence[str], strata: Sequence[str] | None = None, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return the 95% percentile interval of every score that `measure` computes from the weight [N] of each item.

    Items of one unit are drawn together: the weights of a resample are how often each unit was drawn. Each stratum keeps its number of
    units. A resample in which a score is NaN, because it has no such item, is left out for this score."""
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


def t_interval(values: Sequence[float], comparisons: int = 1) -> Interval:
    """Return the mean of at least two independent runs with Student's 95% interval, n - 1 degrees of freedom. For paired differences this
    is the interval of the paired t-test. The intervals of several `comparisons` hold the true means all at once (Bonferroni)."""
    n, mean = len(values), float(np.mean(values))
    half = _half_width(float(np.var(values, ddof=1)) / n, n - 1, comparisons)
    return Interval(mean, mean - half, mean + half, n)


def detectable_difference(sd: float, n: int, power: float) -> float:
    """Return the true mean of `n` differences with this standard deviation that the two-sided t-test at 5% finds with this power."""
    critical = float(stats.t.ppf(0.975, n - 1))

    def excess(shift: float) -> float:
        """Return the power at a mean of `shift` standard errors, above the wanted one. A result on the wrong side does not count."""
        return float(stats.nct.sf(critical, n - 1, shift)) - power

    return float(optimize.brentq(excess, 0.0, 4 * critical)) * sd / n**0.5


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> Interval:
    """Return the mean of `parts` divided by that of `wholes`, which are paired runs, with Fieller's 95% interval (Journal of the Royal
    Statistical Society B 16, 1954). Its ends are infinite if the mean of `wholes` cannot be told apart from 0.

    The interval has every ratio r for which the mean of parts - r * wholes does not differ from 0 by the t-test.
    """
    n, a, b = len(parts), float(np.mean(parts)), float(np.mean(wholes))
    (aa, ab), (_, bb) = np.cov(parts, wholes) / n * float(stats.t.ppf(0.975, n - 1)) ** 2
    ratio, square = a / b if b else float("nan"), b * b - float(bb)
    if square <= 0:
        return Interval(ratio, -float("inf"), float("inf"), n)
    middle, half = a * b - float(ab), max(0.0, (a * b - float(ab)) ** 2 - square * (a * a - float(aa))) ** 0.5
    return Interval(ratio, (middle - half) / square, (middle + half) / square, n)


def paired_p(differences: Sequence[float]) -> float:
    """Return the two-sided p of the paired t-test. It is 1 if all differences are 0, and 0 if all are the same but not 0; both up to
    rounding errors."""
    if np.ptp(differences) <= ROUNDING:
        return float(abs(np.mean(differences)) <= ROUNDING)
    return float(stats.ttest_1samp(differences, 0).pvalue)


def permutation_p(found: float, permuted: Sequence[float]) -> float:
    """Return the share of permutations whose measure is at least `found`, up to rounding errors. The data as they are count as one of the
    permutations, so it is never 0 (Phipson and Smyth, Statistical Applications in Genetics and Molecular Biology 9, 2010)."""
    return (1 + sum(value >= found - ROUNDING for value in permuted)) / (1 + len(permuted))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjustment for several tests: the smallest p times their number, the next times one fewer, never falling, at most 1."""
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1)
    return adjusted.tolist()


def crossed_interval(values_SN: np.ndarray, units: Sequence[str]) -> Interval:
    """Return the mean over S runs that answered the same N questions, with a 95% interval for other runs and other questions. There must
    be at least two runs and two units.

    The variance is the sum of two: of the mean over runs, as in `t_interval`, and of the mean over questions, where the questions of a unit
    count together. The interaction of run and question is in both, so the interval is rather too wide than too narrow. It is Student's,
    with Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946), which exceed those of the runs alone, and never narrower than
    the interval over runs.
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


def _half_width(variance: float, freedom: float, comparisons: int = 1) -> float:
    """Return half the width of the 95% interval of a mean with this variance, as one of several."""
    return float(stats.t.ppf(1 - 0.025 / comparisons, freedom)) * variance**0.5
