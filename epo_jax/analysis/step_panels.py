"""Panels over RL steps: success at evaluations, curves of metrics, and entropy in its corridor."""

import functools
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from epo_jax.analysis import curves, intervals
from epo_jax.analysis.arms import Arm
from epo_jax.analysis.columns import Column
from epo_jax.analysis.comparison import GREY, RULE, Comparison, Look, Panel, percent, require, write_name


def success_panel(compared: Comparison, column: Column) -> Panel:
    points = {
        arm.name: [
            [(row["step"], row["won"] / max(1, row["episodes"]), row["episodes"]) for row in column.evaluations(each)]
            for each in arm.runs
        ]
        for arm in compared.arms
    }

    def draw(axes: Axes) -> None:
        for arm in compared.arms:
            runs = [run for run in points[arm.name] if run]
            steps = sorted({step for run in runs for step, *_ in run})
            at = [[(rate, episodes) for run in runs for each, rate, episodes in run if each == step] for step in steps]
            bands = [intervals.of_success(*map(list, zip(*found, strict=True))) for found in at]
            _lines(axes, compared.look(arm), [([s for s, *_ in run], [rate for _, rate, _ in run]) for run in runs], steps, bands)
            axes.plot(steps, [band.mean for band in bands], "o", color=compared.look(arm).color, markersize=3, clip_on=False)
        percent(axes)
        _over_steps(axes, compared, share=True)
        _label(axes, compared, {arm.name: _end(points[arm.name]) for arm in compared.arms})

    return Panel(f"Success, {column.title(compared.runs)}", draw)


def curve_panel(compared: Comparison, curve: curves.Curve) -> Panel:
    runs = {arm.name: [_smooth(curves.points_of(each, curve.key), compared.smooth) for each in arm.runs] for arm in compared.arms}
    require(any(run for found in runs.values() for run in found), curve.key)

    def draw(axes: Axes) -> None:
        for arm in compared.arms:
            found = [run for run in runs[arm.name] if run]
            steps = sorted({step for run in found for step, _ in run})
            values = [dict(run) for run in found]
            bands = [intervals.of_mean([run[step] for run in values if step in run]) for step in steps]
            _lines(axes, compared.look(arm), [tuple(zip(*run, strict=True)) for run in found], steps, bands)
        if curve.key == "success":
            percent(axes)
        _over_steps(axes, compared, share=curve.key == "success")
        if compared.smooth > 1:
            axes.set_xlabel(f"RL step (means of {compared.smooth} steps)")
        axes.set_ylabel(curve.unit)
        _label(axes, compared, {arm.name: _end(runs[arm.name]) for arm in compared.arms})

    return Panel(curve.title, draw)


def corridor_panels(compared: Comparison) -> list[Panel]:
    """Entropy of each arm and the mean edges of its corridor, on one scale."""
    has = [arm for arm in compared.arms if any(curves.points_of(each, "corridor_high") for each in arm.runs)]
    values = [
        y for arm in has for each in arm.runs for key in ("entropy", "corridor_high") for _, y in curves.points_of(each, key)
    ]

    def draw(arm: Arm, axes: Axes) -> None:
        look, edges = compared.look(arm), []
        runs = [curves.points_of(each, "entropy") for each in arm.runs]
        steps = sorted({step for run in runs for step, _ in run})
        bands = [intervals.of_mean([y for run in runs for step, y in run if step == at]) for at in steps]
        _lines(axes, look._replace(style="-"), [tuple(zip(*run, strict=True)) for run in runs if run], steps, bands)
        for key in curves.CORRIDOR:
            found: dict[int, list[float]] = {}
            for each in arm.runs:
                for step, y in curves.points_of(each, key):
                    found.setdefault(step, []).append(y)
            edges.append([fmean(found[step]) for step in sorted(found)])
            axes.plot(sorted(found), edges[-1], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.fill_between(sorted(found), edges[0], edges[1], color=GREY, alpha=0.12, linewidth=0)
        _over_steps(axes, compared)
        axes.set_ylim(0, 1.05 * max(values))
        axes.set_ylabel("nats per token")

    return [Panel(f"Entropy and corridor, {arm.name}", functools.partial(draw, arm)) for arm in has]


def _lines(axes: Axes, look: Look, runs: Iterable[Any], steps: Sequence[int], bands: Sequence[intervals.Estimate]) -> None:
    """Runs as thin lines, their mean as a thick one in its interval."""
    runs = list(runs)
    if len(runs) > 1:
        for x, y in runs:
            axes.plot(x, y, color=look.color, linewidth=0.5, alpha=0.3)
    inside = [(step, band) for step, band in zip(steps, bands, strict=True) if band.low is not None]
    if inside and len(runs) != 2:  # the interval of two runs is wider than the axes
        at, found = zip(*inside, strict=True)
        axes.fill_between(at, [b.low for b in found], [b.high for b in found], color=look.color, alpha=0.1, linewidth=0)
    axes.plot(steps, [band.mean for band in bands], color=look.color, linestyle=look.style, linewidth=1.6)


def _over_steps(axes: Axes, compared: Comparison, share: bool = False) -> None:
    """Axes over all RL steps, whose vertical one holds all lines, and 0 for shares or if that is near."""
    axes.set_xlim(0, compared.steps)
    axes.set_xlabel("RL step")
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    low, high = axes.get_ylim()
    # An interval of few runs may be far wider than the runs: the axes hold the means and the runs.
    seen = [y for line in axes.lines for y in line.get_ydata()]
    if share or 0 <= min(seen) < 0.5 * max(seen):
        seen.append(0.0)
    room = 0.06 * (max(seen) - min(seen) or abs(max(seen)) or 1)
    axes.set_ylim(max(low, min(seen) - room) if min(seen) else -room, min(high, max(seen) + room))


def _end(runs: Sequence[Sequence[tuple]]) -> float | None:
    """Mean of the last values of runs."""
    last = [run[-1][1] for run in runs if run]
    return fmean(last) if last else None


def _label(axes: Axes, compared: Comparison, ends: dict[str, float | None]) -> None:
    """Writes the name of each arm at the end of its line."""
    if len(compared.arms) == 1:
        return
    for arm in compared.arms:
        if (end := ends[arm.name]) is not None:
            write_name(axes, arm.name, end, compared.look(arm).color)


def _smooth(points: Sequence[tuple[int, float]], width: int) -> list[tuple[int, float]]:
    """Each value as the mean of the last `width`, of fewer at the start."""
    return [
        (step, fmean(value for _, value in points[max(0, end + 1 - width) : end + 1])) for end, (step, _) in enumerate(points)
    ]
