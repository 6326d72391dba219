"""Intervals and tests for few runs of many episodes. All intervals cover 95 %."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from scipy import stats

from epo_jax.runs.metrics import wilson


class Estimate(NamedTuple):
    """A mean with its interval, whose bounds are None where too few runs give none."""

    mean: float
    low: float | None
    high: float | None


def of_success(rates: Sequence[float], episodes: Sequence[int]) -> Estimate:
    """Mean success of runs, with an interval for the seeds that were not run.

    Wilson's interval for as many episodes as would make the mean vary as the success of the runs does, at most all of them
    (Franco et al. 2019, PMC6690503), reduced by (z / t)^2, with one degree of freedom fewer than runs (Korn and Graubard 1998).
    It stays within [0, 1], and does not shrink to a point if all runs won nothing or everything.

    Args:
        rates: success of each run in [0, 1].
        episodes: how many episodes each is the share of.
    """
    mean, total, count = fmean(rates), sum(episodes), len(rates)
    if count == 1:
        return Estimate(mean, *wilson(mean * total, total))
    variance = stdev(rates) ** 2 / count
    effective = min(total, mean * (1 - mean) / variance) if variance else total
    effective *= (stats.norm.ppf(0.975) / stats.t.ppf(0.975, count - 1)) ** 2
    return Estimate(mean, *wilson(mean * effective, effective))


def of_mean(values: Sequence[float]) -> Estimate:
    """Mean of one number a run, with its t interval; without one for a single run."""
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, None)
    half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> tuple[dict[int, float], Estimate | None]:
    """Differences from the reference of the same seed, and their mean with its t interval; None without a common seed."""
    differences = {seed: values[seed] - reference[seed] for seed in values if seed in reference}
    return differences, of_mean(list(differences.values())) if differences else None


def correlation(x: Sequence[float], y: Sequence[float]) -> Estimate | None:
    """Pearson's r with the interval of Fisher's z; None for fewer than four points or if x or y is constant."""
    if len(x) < 4 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    found = stats.pearsonr(x, y)
    interval = found.confidence_interval(0.95)
    return Estimate(float(found.statistic), float(interval.low), float(interval.high))


def fisher(first: int, of_first: int, second: int, of_second: int) -> float:
    """Two-sided p of Fisher's exact test, of `first` runs out of `of_first` against `second` out of `of_second`."""
    return float(stats.fisher_exact([[first, of_first - first], [second, of_second - second]]).pvalue)
