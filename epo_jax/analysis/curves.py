"""What the page draws over RL steps: metrics, success, and entropy by turn of the episode."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from epo_jax.analysis.arms import Arm
from epo_jax.analysis.columns import Column
from epo_jax.analysis.measures import entropy_ratios
from epo_jax.analysis.read import Run
from epo_jax.runs.metrics import wilson

# Points of a curve, and columns of a heat map, at most; more steps are averaged in equal bins.
POINTS = 150
COLUMNS = 60


class Curve(NamedTuple):
    """A metric over RL steps; `key` is its name in metrics.jsonl, or `RATIO`."""

    key: str
    title: str
    unit: str


RATIO = "entropy_ratio"
CURVES = (
    Curve("success", "Success of training episodes", "share won"),
    Curve("reward", "Return of training episodes", "mean"),
    Curve("entropy", "Entropy of sampled tokens", "nats per token"),
    Curve(RATIO, "Entropy as H_k / H_0", ""),
    Curve("entropy_first_turns", "Entropy, first ten turns", "nats per token"),
    Curve("entropy_last_turns", "Entropy, last ten turns", "nats per token"),
    Curve("entropy_std_tokens", "Spread of entropy over tokens", "nats, std"),
    Curve("entropy_std_episodes", "Spread of entropy over episodes", "nats, std"),
    Curve("beta", "Phase weight β_k", ""),
    Curve("outside_corridor", "Tokens outside the corridor", "share"),
    Curve("policy_grad_norm", "Gradient norm of the policy term", ""),
    Curve("entropy_grad_norm", "Gradient norm of the entropy term", ""),
    Curve("grad_cosine", "Cosine of the angle between the two", ""),
    Curve("grad_norm", "Gradient norm of the loss", ""),
    Curve("uniform_groups", "Groups of equal returns", "groups"),
    Curve("action_entropy_given_task", "Entropy of the action given the task", "nats"),
    Curve("task_action_information", "Information between task and action", "nats"),
    Curve("repeated_actions", "Repeated actions", "share"),
    Curve("ratio_variance", "Variance of the ratio new / old", ""),
    Curve("effective_sample_size", "Effective sample size", "share"),
    Curve("sampler_gap_mean", "Log-probability, sampler against learner", "nats per token"),
    Curve("kl", "KL to the reference policy", "nats per token"),
    Curve("approx_kl", "KL to the policy before the update (k1 estimate)", "nats per token"),
    Curve("clip_fraction", "Clipped tokens", "share"),
)
CORRIDOR = ("corridor_low", "corridor_high")


def points_of(each: Run, key: str) -> list[tuple[int, float]]:
    """(step, value) of a curve of one run, without steps that have none."""
    if key == RATIO:
        return entropy_ratios(each.metrics)
    return [(row["step"], row[key]) for row in each.metrics if row.get(key) is not None]


def curve(arm: Arm, key: str) -> dict[str, list] | None:
    """A metric over RL steps: mean over runs, and the lowest and the highest run where there are several.

    Steps are averaged in bins where there are more than `POINTS`. None where no run has it.
    """
    width = _bin_width(arm, POINTS)
    found: dict[int, list[float]] = {}
    for each in arm.runs:
        for place, value in _binned(points_of(each, key), width).items():
            found.setdefault(place, []).append(value)
    middle = (width - 1) / 2
    columns = _columns([(width * b + middle, fmean(v), min(v), max(v)) for b, v in sorted(found.items())])
    # With one run both edges are the line itself, and most of a page of a hundred runs.
    return columns and (columns if len(arm.runs) > 1 else {"x": columns["x"], "y": columns["y"]})


def success_curve(arm: Arm, column: Column) -> dict[str, list] | None:
    """Success at each evaluated step: mean over runs, with the lowest and the highest; of one run, with its Wilson interval."""
    found: dict[int, list[tuple[int, int]]] = {}
    for each in arm.runs:
        for row in column.evaluations(each):
            found.setdefault(row["step"], []).append((row["won"], row["episodes"]))
    points = []
    for step, counts in sorted(found.items()):
        rates = [won / max(1, episodes) for won, episodes in counts]
        low, high = wilson(*counts[0]) if len(arm.runs) == 1 else (min(rates), max(rates))
        points.append((step, fmean(rates), low, high))
    return _columns(points)


def turn_entropy(arm: Arm) -> dict[str, Any] | None:
    """Entropy by turn index: `entropy[column][turn]`, nats, mean over runs of `width` RL steps from `first` on; None where
    no run has it. Rows of metrics.jsonl hold it as entropy_turn_0, entropy_turn_1, ..."""
    width = _bin_width(arm, COLUMNS)
    keys = {key for each in arm.runs for row in each.metrics for key in row if key.startswith("entropy_turn_")}
    turns = sorted(int(key.rpartition("_")[2]) for key in keys if key.rpartition("_")[2].isdigit())
    cells = [[_binned(points_of(each, f"entropy_turn_{turn}"), width) for each in arm.runs] for turn in turns]
    places = sorted({place for row in cells for binned in row for place in binned})
    if not places:
        return None
    columns = [
        [_mean([binned[place] for binned in row if place in binned]) for row in cells]
        for place in range(places[0], places[-1] + 1)
    ]
    return {"first": width * places[0], "width": width, "turns": turns, "entropy": columns}


def _binned(points: Iterable[tuple[int, float]], width: int) -> dict[int, float]:
    """Mean of the values in each bin of `width` steps."""
    found: dict[int, list[float]] = {}
    for step, value in points:
        found.setdefault(step // width, []).append(value)
    return {place: fmean(values) for place, values in found.items()}


def _bin_width(arm: Arm, most: int) -> int:
    last = max((row["step"] for each in arm.runs for row in each.metrics), default=0)
    return -(-(last + 1) // most)


def _columns(points: Sequence[tuple]) -> dict[str, list] | None:
    """{"x": ..., "y": ..., "low": ..., "high": ...} with five digits, which is more than a screen shows."""
    if not points:
        return None
    named = zip(("x", "y", "low", "high"), zip(*points, strict=True), strict=True)
    return {name: [_short(value) for value in column] for name, column in named}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _mean(values: list[float]) -> float | None:
    return _short(fmean(values)) if values else None
