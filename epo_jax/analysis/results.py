"""The results of arms: success with its intervals, the measures of their runs, and differences from a reference arm."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from epo_jax.analysis import intervals
from epo_jax.analysis.arms import Arm
from epo_jax.analysis.columns import Column, column_of
from epo_jax.analysis.measures import BY_KEY, COLLAPSES, MEASURES, SUCCESS_WINDOW, Measure, best_success, evaluations_from, series
from epo_jax.analysis.read import OOD, Run
from epo_jax.runs.metrics import Row


def success(arm: Arm, column: Column, from_step: int | None) -> dict[str, Any] | None:
    """Succ and Succ* of an arm's evaluations; None without any.

    Succ is the mean over the runs of each run's mean over its evaluations after at least `from_step` RL steps (None: of its last
    one), Succ* that of each run's best evaluation.
    """
    chosen = [rows for each in arm.runs if (rows := evaluations_from(column.evaluations(each), from_step))]
    if not chosen:
        return None
    values = [final_rate(rows) for rows in chosen]
    best = [row for each in arm.runs if (row := best_success(column.evaluations(each)))]
    best_values = [*map(_rate, best)]
    return {
        # The games are the same in every evaluation, so that several tell little more of their difficulty than one.
        **intervals.of_success(values, [rows[-1]["episodes"] for rows in chosen])._asdict(),
        "values": values,
        "counts": [(rows[-1]["won"], rows[-1]["episodes"]) for rows in chosen],
        "step": max(row["step"] for rows in chosen for row in rows),
        "best": intervals.of_success(best_values, [row["episodes"] for row in best])._asdict() if best else None,
        "best_values": best_values,
        "types": _types([rows[-1] for rows in chosen]),
    }


def final_rate(rows: Sequence[Row]) -> float:
    """Mean success of evaluations."""
    return fmean(map(_rate, rows))


def _rate(row: Row) -> float:
    return row["won"] / max(1, row["episodes"])


def _types(rows: Sequence[Row]) -> dict[str, list[int]]:
    """{task type: [won, episodes]} of all rows together."""
    types: dict[str, list[int]] = {}
    for row in rows:
        for kind, (won, episodes) in row.get("types", {}).items():
            total = types.setdefault(kind, [0, 0])
            total[0] += won
            total[1] += episodes
    return types


def measures(arm: Arm) -> dict[str, dict[str, Any]]:
    """Each measure of an arm: its value in every run, and their mean with its interval (None where a run has no value)."""
    found: dict[str, dict[str, Any]] = {}
    for measure in MEASURES:
        values = [measure.of(each.metrics) for each in arm.runs]
        found[measure.key] = {"values": values, **_estimate(measure, values, arm)._asdict()}
    return found


def _estimate(measure: Measure, values: list[Any], arm: Arm) -> intervals.Estimate:
    if None in values:
        return intervals.Estimate(None, None, None)
    if measure.unit != "share":
        return intervals.of_mean(values)
    episodes = [training_episodes(each) for each in arm.runs]
    return intervals.of_success(values, episodes) if all(episodes) else intervals.Estimate(fmean(values), None, None)


def training_episodes(each: Run) -> int:
    """Episodes of the RL steps that `last_success` averages; 0 if no config tells."""
    config, steps = each.config, len(series(each.metrics, "success")[-SUCCESS_WINDOW:])
    return steps * config.get("rollout.groups", 0) * config.get("rollout.group_size", 0)


def collapses(arm: Arm) -> dict[str, list[int | None]]:
    """{criterion: the step at which each run collapsed, None if it did not}."""
    return {name: [step(each.metrics) for each in arm.runs] for name, step in COLLAPSES.items()}


def versus(arm: Arm, reference: Arm, columns: Sequence[Column], from_step: int | None) -> dict[str, Any]:
    """An arm against the reference: paired differences by seed of every measure and success, and Fisher's test of collapses.

    Returns:
        {"differences": {key: {"seeds", "values", "mean", "low", "high"}}, "p": {criterion of collapse: p}}
    """
    differences = {}
    for key in difference_keys(columns):
        values, estimate = intervals.paired(by_seed(arm, key, from_step), by_seed(reference, key, from_step))
        if estimate:
            differences[key] = {"seeds": [*values], "values": [*values.values()], **estimate._asdict()}
    here, there = collapses(arm), collapses(reference)
    count = {name: [sum(step is not None for step in steps) for steps in (here[name], there[name])] for name in here}
    p = {name: intervals.fisher(a, len(arm.runs), b, len(reference.runs)) for name, (a, b) in count.items()}
    return {"differences": differences, "p": p}


def difference_keys(columns: Sequence[Column]) -> list[str]:
    """What arms are compared by: success, Succ*, and each measure that every run has."""
    keys = [column.key for column in columns]
    return [*keys, *(f"best {key}" for key in keys), *(measure.key for measure in MEASURES if measure.unit != "steps")]


def by_seed(arm: Arm, key: str, from_step: int | None) -> dict[int, float]:
    """{seed: a key of `difference_keys`} of the runs that have both; with a seed more than once, the first."""
    found: dict[int, float] = {}
    for each in arm.runs:
        value, seed = value_of(each, key, from_step), each.config.get("seed")
        if value is not None and seed is not None:
            found.setdefault(seed, value)
    return found


def value_of(each: Run, key: str, from_step: int | None) -> float | None:
    """The number of a run that a key of `difference_keys` names."""
    if key in BY_KEY:
        return BY_KEY[key].of(each.metrics)
    rows = column_of(key).evaluations(each)
    chosen = [best_success(rows)] if key.startswith("best ") else evaluations_from(rows, from_step)
    return final_rate(chosen) if chosen and chosen[0] else None


def final_success(each: Run, from_step: int | None) -> float | None:
    """What success is in the scatter over runs: Succ of OOD, or training success of a run without evaluations of it."""
    found = value_of(each, OOD, from_step)
    return value_of(each, "train_success", from_step) if found is None else found


def scatter(arms: Sequence[Arm], key: str, from_step: int | None) -> dict[str, Any]:
    """A measure against final success over the runs of all arms, with Pearson's r and its interval.

    Returns:
        {"key", "x", "y": a value for each run or None, "r": over all runs, "within": r of the deviations from the means of the
        arms, "runs": how many have both}
    """
    runs = [(i, each) for i, arm in enumerate(arms) for each in arm.runs]
    points = [(value_of(each, key, from_step), final_success(each, from_step), i) for i, each in runs]
    whole = [point for point in points if None not in point]
    x, y, arm = [x for x, *_ in whole], [y for _, y, _ in whole], [i for *_, i in whole]
    r, within = intervals.correlation(x, y), intervals.correlation(x, y, arm) if len(set(arm)) > 1 else None
    return {
        "key": key,
        "x": [x for x, *_ in points],
        "y": [y for _, y, _ in points],
        "r": r._asdict() if r else None,
        "within": within._asdict() if within else None,
        "runs": len(whole),
    }
