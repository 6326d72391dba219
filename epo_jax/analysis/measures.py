"""The measures of a run: one number from its rows each. docs/metrics.md defines them under "In the report"."""

import itertools
from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import NamedTuple

from epo_jax.runs.metrics import Row

# RL steps of the running mean of training success, and of the trend of entropy.
SUCCESS_WINDOW, TREND_WINDOW = 10, 11
# A run has collapsed if entropy exceeds so many times that of its first step, or if training success stays below so large a
# part of its running best for so many RL steps.
COLLAPSE_ENTROPY, COLLAPSE_SUCCESS, COLLAPSE_STEPS = 5.0, 0.5, 5


class Measure(NamedTuple):
    """A number of a run.

    Attributes:
        key: its name in the files and on the page.
        title: heading of a column.
        unit: "share", "nats", "ratio", "steps" or "".
        of: its value from the rows of metrics.jsonl, None where they lack what it needs.
    """

    key: str
    title: str
    unit: str
    of: Callable[[Sequence[Row]], float | None]


def series(rows: Sequence[Row], key: str) -> list[float]:
    """The values of a metric in the order of steps, without those that are missing."""
    return [row[key] for row in rows if row.get(key) is not None]


# -------------------------------------------------------------------- success


def best_success(evaluations: Sequence[Row]) -> Row | None:
    """The evaluation with the highest success (the earliest of equals); that of the initial policy does not count."""
    return max((row for row in evaluations if row["step"] > 0), key=lambda row: (row["success"], -row["step"]), default=None)


def evaluations_from(evaluations: Sequence[Row], step: int | None) -> list[Row]:
    """The evaluations after at least `step` RL steps; the last one alone if `step` is None."""
    last = max((row["step"] for row in evaluations), default=0)
    return [row for row in evaluations if row["step"] >= (last if step is None else step)]


def steps_to(rows: Sequence[Row], share: float, window: int = SUCCESS_WINDOW) -> int | None:
    """RL steps taken until training success, as the mean of the last `window` steps, reached `share`; None if it never did."""
    rows = [row for row in rows if row.get("success") is not None]
    success = [row["success"] for row in rows]
    ends = range(window, len(rows) + 1)
    return next((rows[end - 1]["step"] + 1 for end in ends if fmean(success[end - window : end]) >= share), None)


def last_success(rows: Sequence[Row]) -> float | None:
    """Training success over the last `SUCCESS_WINDOW` RL steps."""
    return _mean(series(rows, "success")[-SUCCESS_WINDOW:])


# -------------------------------------------------------------------- entropy, nats per policy token


def entropy_ratios(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """(step k, H_k / H_0) of each step, H_0 being the first entropy; [] if that is 0 or missing."""
    points = [(row["step"], row["entropy"]) for row in rows if row.get("entropy") is not None]
    return [(step, entropy / points[0][1]) for step, entropy in points] if points and points[0][1] else []


def roughness(values: Sequence[float]) -> float | None:
    """mean |H_k - H_(k-1)| / mean H."""
    changes = [abs(b - a) for a, b in itertools.pairwise(values)]
    return fmean(changes) / fmean(values) if changes and fmean(values) else None


def change_std(values: Sequence[float]) -> float | None:
    """Standard deviation of the change H_k - H_(k-1) over the steps; a steady rise has none."""
    changes = [b - a for a, b in itertools.pairwise(values)]
    return pstdev(changes) if changes else None


def trend_variance(values: Sequence[float], window: int = TREND_WINDOW) -> float | None:
    """Mean square distance of H_k from the mean of the `window` steps around k, over the steps that have them all."""
    half = window // 2
    distances = [values[k] - fmean(values[k - half : k + half + 1]) for k in range(half, len(values) - half)]
    return fmean(distance**2 for distance in distances) if distances else None


def later_mean(rows: Sequence[Row], key: str) -> float | None:
    """Mean of a metric over the later half of the steps."""
    values = series(rows, key)
    return _mean(values[len(values) // 2 :])


def later_variance(rows: Sequence[Row], key: str) -> float | None:
    """Variance of a metric over the later half of the steps."""
    values = series(rows, key)
    return pstdev(values[len(values) // 2 :]) ** 2 if values else None


def corridor_deviation(rows: Sequence[Row]) -> float | None:
    """Sum over the steps of how far H_k is outside of the corridor of its step, in nats per token; None without corridor."""
    rows = [row for row in rows if all(row.get(key) is not None for key in ("entropy", "corridor_low", "corridor_high"))]
    outside = [max(0.0, row["corridor_low"] - row["entropy"], row["entropy"] - row["corridor_high"]) for row in rows]
    return sum(outside) if outside else None


# -------------------------------------------------------------------- collapse


def collapse_of_entropy(rows: Sequence[Row]) -> int | None:
    """The first step whose entropy exceeds `COLLAPSE_ENTROPY` times that of the first; None if none does."""
    return next((step for step, ratio in entropy_ratios(rows) if ratio > COLLAPSE_ENTROPY), None)


def collapse_of_success(rows: Sequence[Row]) -> int | None:
    """The step at which training success has been below half of its running best for five steps in a row; None if never."""
    best, below = 0.0, 0
    for row in rows:
        if row.get("success") is None:
            continue
        below = below + 1 if row["success"] < COLLAPSE_SUCCESS * best else 0
        best = max(best, row["success"])
        if below == COLLAPSE_STEPS:
            return row["step"]
    return None


COLLAPSES: dict[str, Callable[[Sequence[Row]], int | None]] = {
    "entropy": collapse_of_entropy,
    "success": collapse_of_success,
}

MEASURES = (
    Measure("train_success", "training success, last 10 steps", "share", last_success),
    Measure("steps_to_50", "steps to 50 %", "steps", lambda rows: steps_to(rows, 0.5)),
    Measure("steps_to_70", "steps to 70 %", "steps", lambda rows: steps_to(rows, 0.7)),
    Measure("entropy", "H, later half", "nats", lambda rows: later_mean(rows, "entropy")),
    Measure("entropy_variance", "its variance", "", lambda rows: later_variance(rows, "entropy")),
    Measure("highest_ratio", "highest H_k / H_0", "ratio", lambda rows: max((r for _, r in entropy_ratios(rows)), default=None)),
    Measure("last_ratio", "last H_k / H_0", "ratio", lambda rows: next((r for _, r in entropy_ratios(rows)[::-1]), None)),
    Measure("roughness", "roughness", "ratio", lambda rows: roughness(series(rows, "entropy"))),
    Measure("change_std", "std(dH)", "nats", lambda rows: change_std(series(rows, "entropy"))),
    Measure("trend_variance", "variance around the trend", "", lambda rows: trend_variance(series(rows, "entropy"))),
    Measure("entropy_first_turns", "H, first ten turns", "nats", lambda rows: later_mean(rows, "entropy_first_turns")),
    Measure("entropy_last_turns", "H, last ten turns", "nats", lambda rows: later_mean(rows, "entropy_last_turns")),
    Measure("corridor_deviation", "outside of the corridor, summed", "nats", corridor_deviation),
)  # fmt: skip

BY_KEY = {measure.key: measure for measure in MEASURES}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
