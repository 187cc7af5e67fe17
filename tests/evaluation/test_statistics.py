"""Statistics against numbers worked out by hand, and the coverage of intervals."""

import numpy as np
import pytest

from moe_llava.evaluation.score.statistics import crossed_interval, holm, paired_p, permutation_p, t_interval


def test_student_by_hand():
    """1, 2, 3: mean 2, standard error 1 / sqrt 3; t(2) at 0.975 is 4.30265."""
    interval = t_interval([1.0, 2.0, 3.0])
    half = 4.30265 / 3**0.5
    assert (interval.mean, interval.n) == (2.0, 3)
    assert (interval.low, interval.high) == (pytest.approx(2 - half, abs=1e-4), pytest.approx(2 + half, abs=1e-4))


def test_p_by_hand():
    """Two differences d and 3 d: t is 2 with one degree of freedom, whose distribution is Cauchy's: p = 1 - 2 atan(2) / pi."""
    assert paired_p([1.0, 3.0]) == pytest.approx(1 - 2 * np.arctan(2) / np.pi)
    assert paired_p([0.0, 0.0, 0.0]) == 1
    assert paired_p([0.5, 0.5, 0.5]) == 0
    # (0.9 - 0.8) - (0.8 - 0.7) is 0, but not in floating point.
    assert paired_p([(0.9 - 0.8) - (0.8 - 0.7)] * 3) == 1
    assert paired_p([1e-16, 2e-16, 3e-16]) == 1


def test_p_and_interval_agree():
    """p is below 0.05 exactly if the interval excludes 0."""
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        differences = random.normal(1, 1, 5).tolist()
        interval = t_interval(differences)
        assert (paired_p(differences) < 0.05) == (interval.low > 0 or interval.high < 0)
        seen.add(paired_p(differences) < 0.05)
    assert seen == {True, False}


def test_permutations_that_reach_it():
    assert permutation_p(0.5, [0.1, 0.5, 0.6]) == 0.75
    assert permutation_p(0.5, [0.1] * 19) == 0.05
    assert permutation_p(2e-16, [0.0, 1e-16, 3e-16]) == 1  # all are 0: rounding errors decide nothing


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def test_crossed_interval_has_both_variances():
    units = ["a", "a", "b", "b", "c", "c"]
    only_runs = np.array([[0.0] * 6, [1.0] * 6, [2.0] * 6])
    interval, runs = crossed_interval(only_runs, units), t_interval([0.0, 1.0, 2.0])
    assert (interval.mean, interval.low, interval.high) == pytest.approx((runs.mean, runs.low, runs.high))
    only_units = np.array([[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]] * 3)
    interval = crossed_interval(only_units, units)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((runs.mean, runs.low, runs.high))
    more_units = [str(number) for number in range(400)]
    width = {}
    for spread in (0.0, 0.1, 1.0, 5.0):
        values = np.array([[0.0], [1.0], [2.0]]) + np.linspace(-spread, spread, 400)
        interval = crossed_interval(values, more_units)
        width[spread] = interval.high - interval.low
    assert list(width.values()) == sorted(width.values())
    assert width[0.0] == pytest.approx(runs.high - runs.low)
    nothing = crossed_interval(np.zeros((3, 6)), units)
    assert (nothing.low, nothing.mean, nothing.high) == (0, 0, 0)


def test_crossed_interval_holds_what_it_promises():
    """If runs, units and answers vary, at least 95% of intervals contain the mean; of those over runs only, far fewer do."""
    random = np.random.default_rng(0)
    units = [str(number // 4) for number in range(80)]
    held, held_by_runs = 0, 0
    for _ in range(400):
        values = random.normal(0, 0.05, (5, 1)) + np.repeat(random.normal(0, 0.5, 20), 4) + random.normal(0, 0.3, (5, 80))
        interval, runs = crossed_interval(values, units), t_interval(values.mean(axis=1).tolist())
        held += interval.low <= 0 <= interval.high
        held_by_runs += runs.low <= 0 <= runs.high
    assert held >= 0.93 * 400
    assert held_by_runs < 0.8 * 400
