"""Intervals and tests for few runs of many episodes. All intervals cover 95 %."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
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


def correlation(x: Sequence[float], y: Sequence[float], groups: Sequence[int] | None = None) -> Estimate | None:
    """Pearson's r with the interval of Fisher's z.

    None if the points are fewer than four (and one more for each further group), or if x or y is constant.

    Args:
        groups: the group of each point; r is then that of the deviations from the means of the groups.
    """
    groups = [0] * len(x) if groups is None else groups
    x, y = (np.array(_deviations(values, groups)) for values in (x, y))
    squares = math.sqrt((x @ x) * (y @ y))
    free = len(x) - len(set(groups)) - 2
    if free < 1 or not squares:
        return None
    r = max(-1.0, min(1.0, float(x @ y) / squares))
    if abs(r) == 1.0:
        return Estimate(r, r, r)
    half = stats.norm.ppf(0.975) / math.sqrt(free)
    return Estimate(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half))


def _deviations(values: Sequence[float], groups: Sequence[int]) -> list[float]:
    """Values minus the mean of their group; exactly 0 in a group of equal values."""
    members: dict[int, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    means = {group: found[0] if len(set(found)) == 1 else fmean(found) for group, found in members.items()}
    return [value - means[group] for value, group in zip(values, groups, strict=True)]


def fisher(first: int, of_first: int, second: int, of_second: int) -> float:
    """Two-sided p of Fisher's exact test, of `first` runs out of `of_first` against `second` out of `of_second`."""
    return float(stats.fisher_exact([[first, of_first - first], [second, of_second - second]]).pvalue)
