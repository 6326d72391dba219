"""Intervals and tests, against closed forms, tables and simulated repetitions."""

import math

import numpy as np
import pytest

from epo_jax.analysis import intervals
from epo_jax.runs.metrics import wilson


def test_success_of_one_run_has_its_wilson_interval():
    assert intervals.of_success([0.45], [20]) == (pytest.approx(0.45), *map(pytest.approx, wilson(9, 20)))


def test_runs_that_won_nothing_leave_room_for_others():
    """All 12 episodes count, reduced by (1.96 / 12.706)^2 for two runs. Wilson's bound of 0 of n is z^2 / (n + z^2)."""
    z, t = 1.959964, 12.7062
    found = intervals.of_success([0.0, 0.0], [6, 6])
    assert (found.mean, found.low) == (0, 0)
    assert found.high == pytest.approx(z**2 / (12 * (z / t) ** 2 + z**2), rel=1e-4) and found.high > 0.9
    five = intervals.of_success([0.0] * 5, [120] * 5)
    assert 0.01 < five.high < 0.02
    assert intervals.of_success([1.0, 1.0], [6, 6]).low == pytest.approx(1 - found.high)


def test_success_of_runs_that_differ_has_about_the_t_interval():
    """Around one half Wilson's interval of p (1 - p) / s^2 episodes is the t interval, drawn in towards the middle a little."""
    rates = [0.3, 0.4, 0.5, 0.6, 0.7]
    found, t = intervals.of_success(rates, [1000] * 5), intervals.of_mean(rates)
    assert found.mean == t.mean == pytest.approx(0.5)
    assert found.high - found.low == pytest.approx(t.high - t.low, rel=0.1) and t.low < found.low


@pytest.mark.parametrize(("shape", "least"), [((0.5, 4.5), 0.90), ((6.0, 6.0), 0.93), ((18.0, 2.0), 0.93)])
def test_success_is_covered_as_often_as_claimed(shape, least):
    """Five seeds of 120 episodes, whose true success is drawn from a beta distribution; the truth is its mean.

    The first is very skewed. A bootstrap over runs and episodes covers 80, 89 and 88 %, the t interval 87, 95 and 92 %.
    """
    rng, truth, covered = np.random.default_rng(0), shape[0] / sum(shape), 0
    for _ in range(1000):
        found = intervals.of_success((rng.binomial(120, rng.beta(*shape, size=5)) / 120).tolist(), [120] * 5)
        covered += found.low <= truth <= found.high
    assert covered >= 1000 * least


def test_t_interval():
    """Of 1, 2, 3: t(2) = 4.30265, s = 1."""
    assert intervals.of_mean([1.0, 2.0, 3.0]) == pytest.approx(
        (2.0, 2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), rel=1e-5
    )
    assert intervals.of_mean([2.0]) == (2.0, None, None)


def test_differences_are_those_of_common_seeds():
    differences, found = intervals.paired({0: 1.0, 1: 4.0, 2: 9.0, 7: 1.0}, {2: 6.0, 1: 3.0, 0: -1.0, 9: 0.0})
    assert differences == {0: 2.0, 1: 1.0, 2: 3.0} and found == intervals.of_mean([2.0, 1.0, 3.0])
    assert intervals.paired({0: 1.0}, {1: 1.0}) == ({}, None)


def test_correlation_with_the_interval_of_fishers_z():
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 5.0]
    found = intervals.correlation(x, y)
    assert found.mean == pytest.approx(0.8)
    z, half = math.atanh(0.8), 1.959964 / math.sqrt(2)
    assert (found.low, found.high) == pytest.approx((math.tanh(z - half), math.tanh(z + half)), rel=1e-5)
    assert intervals.correlation(x[:3], y[:3]) is None and intervals.correlation(x, [1.0] * 5) is None


def test_fishers_exact_test():
    """Five of five against none of five: both extreme tables have the probability 1 / C(10, 5)."""
    assert intervals.fisher(5, 5, 0, 5) == pytest.approx(2 / math.comb(10, 5))
    assert intervals.fisher(2, 5, 2, 5) == pytest.approx(1.0)


def test_correlation_within_groups_ignores_differences_between_them():
    """Two groups on one rising line, each of which falls."""
    x, y = [1.0, 2.0, 3.0, 11.0, 12.0, 13.0], [3.0, 2.0, 1.0, 13.0, 12.0, 11.5]
    assert intervals.correlation(x, y).mean > 0.9
    found = intervals.correlation(x, y, [0, 0, 0, 1, 1, 1])
    deviations = np.array([1, 0, -1, 5 / 6, -1 / 6, -4 / 6])
    r = np.corrcoef([-1, 0, 1, -1, 0, 1], deviations)[0, 1]
    half = 1.959964 / math.sqrt(6 - 2 - 2)
    assert found == pytest.approx((r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)))
    assert intervals.correlation(x, y, [0, 0, 1, 1, 2, 2]) is not None and intervals.correlation(x, y, [0, 1, 2, 2, 3, 3]) is None
    assert intervals.correlation(x, [5.1, 5.1, 5.1, 0.3, 0.3, 0.3], [0, 0, 0, 1, 1, 1]) is None
