"""The panels of a comparison of arms.

A panel is named by what it shows:

    OOD, IID, OOD@1          success at each evaluation (at temperature 1), with the 95 % interval of the mean over runs
    success, entropy, ...    a curve of the report (`curves.CURVES`) over RL steps, with the t interval of the mean
    corridor                 entropy in its corridor, a panel for each arm
    final[:MEASURE]          success at the end, or a measure: each run, and the mean with its interval
    differences[:MEASURE]    differences from the reference arm by seed, with the t interval
    scatter[:MEASURE]        a measure of each run against its final success, with Pearson's r

MEASURE is OOD, "best OOD", OOD@1, or a key such as roughness, change_std, highest_ratio; docs/metrics.md explains them. Thin
lines and dots are runs, thick lines means.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from epo_jax.analysis import curves, intervals, results
from epo_jax.analysis.arms import Arm
from epo_jax.analysis.measures import MEASURES
from epo_jax.analysis.read import IID, OOD, Run
from epo_jax.common.errors import UserError, nearest

# Okabe and Ito's palette without yellow, for any color vision; line styles tell arms apart without color.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f7f7f")
STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), (0, (8, 2)), (0, (1, 2)))
GREY, RULE = "#5c5c5c", "#e6e6e6"
SPLITS = {"OOD": OOD, "IID": IID}


class Look(NamedTuple):
    """How an arm is drawn."""

    color: str
    style: Any


class Comparison(NamedTuple):
    """What panels draw.

    Attributes:
        reference: the arm that differences are from.
        from_step: as in `results.success`.
        smooth: RL steps of the trailing mean of curves.
    """

    arms: Sequence[Arm]
    reference: Arm
    from_step: int | None
    smooth: int

    @property
    def runs(self) -> list[Run]:
        return [each for arm in self.arms for each in arm.runs]

    @property
    def steps(self) -> int:
        return max(each.steps for each in self.runs)

    def look(self, arm: Arm) -> Look:
        n = self.arms.index(arm)
        return Look(COLORS[n % len(COLORS)], STYLES[(n + n // len(COLORS)) % len(STYLES)])


class Panel(NamedTuple):
    """One pair of axes: `rows` is the number of rows of a list, or 0 for a panel of the usual height."""

    title: str
    draw: Callable[[Axes], None]
    rows: int = 0


def panels_of(compared: Comparison, name: str) -> list[Panel]:
    """The panels of one name.

    Raises:
        UserError: no panel is called so, or no run has what it shows.
    """
    kind, _, key = name.partition(":")
    split, _, temperature = name.partition("@")
    found = {curve.key: curve for curve in curves.CURVES}
    if split in SPLITS:
        panels = [_success_panel(compared, SPLITS[split], name, temperature)]
    elif name in found:
        panels = [_curve_panel(compared, found[name])]
    elif name == "corridor":
        panels = _corridor_panels(compared)
    elif kind == "final":
        panels = [_final_panel(compared, _key(compared, key))]
    elif kind == "differences":
        panels = [_difference_panel(compared, _key(compared, key))]
    elif kind == "scatter":
        panels = [_scatter_panel(compared, _key(compared, key or "change_std"))]
    else:
        kinds = [*SPLITS, *found, "corridor", "final", "differences", "scatter"]
        raise UserError(f"there is no panel {name!r}{nearest(name, kinds)}; choose from {', '.join(kinds)}.")
    if not panels:
        raise UserError(f"no run has what the panel {name!r} shows; leave it out.")
    return panels


# -------------------------------------------------------------------- over RL steps


def _success_panel(compared: Comparison, split: str, name: str, temperature: str) -> Panel:
    try:
        column = split, float(temperature) if temperature else None
    except ValueError:
        raise UserError(f"the panel {name!r} must be a split and a temperature, for example 'OOD@1'.") from None
    points = {
        arm.name: [
            [(row["step"], row["won"] / max(1, row["episodes"]), row["episodes"]) for row in each.evaluated(*column)]
            for each in arm.runs
        ]
        for arm in compared.arms
    }
    _require(any(run for runs in points.values() for run in runs), name)

    def draw(axes: Axes) -> None:
        for arm in compared.arms:
            runs = [run for run in points[arm.name] if run]
            steps = sorted({step for run in runs for step, *_ in run})
            at = [[(rate, episodes) for run in runs for each, rate, episodes in run if each == step] for step in steps]
            bands = [intervals.of_success(*map(list, zip(*found, strict=True))) for found in at]
            _lines(axes, compared.look(arm), [([s for s, *_ in run], [rate for _, rate, _ in run]) for run in runs], steps, bands)
            axes.plot(steps, [band.mean for band in bands], "o", color=compared.look(arm).color, markersize=3, clip_on=False)
        _percent(axes)
        _over_steps(axes, compared, share=True)
        _label(axes, compared, {arm.name: _end(points[arm.name]) for arm in compared.arms})

    return Panel(f"Success, {results.column_title(column, compared.runs)}", draw)


def _curve_panel(compared: Comparison, curve: curves.Curve) -> Panel:
    runs = {arm.name: [_smooth(curves.points_of(each, curve.key), compared.smooth) for each in arm.runs] for arm in compared.arms}
    _require(any(run for found in runs.values() for run in found), curve.key)

    def draw(axes: Axes) -> None:
        for arm in compared.arms:
            found = [run for run in runs[arm.name] if run]
            steps = sorted({step for run in found for step, _ in run})
            values = [dict(run) for run in found]
            bands = [intervals.of_mean([run[step] for run in values if step in run]) for step in steps]
            _lines(axes, compared.look(arm), [tuple(zip(*run, strict=True)) for run in found], steps, bands)
        if curve.key == "success":
            _percent(axes)
        _over_steps(axes, compared, share=curve.key == "success")
        if compared.smooth > 1:
            axes.set_xlabel(f"RL step (means of {compared.smooth} steps)")
        axes.set_ylabel(curve.unit)
        _label(axes, compared, {arm.name: _end(runs[arm.name]) for arm in compared.arms})

    return Panel(curve.title, draw)


def _corridor_panels(compared: Comparison) -> list[Panel]:
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


def _percent(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


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
            axes.annotate(arm.name, (1, end), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                          va="center", fontsize=7, color=compared.look(arm).color, annotation_clip=False)  # fmt: skip


# -------------------------------------------------------------------- of runs


def _final_panel(compared: Comparison, key: str) -> Panel:
    values = {arm.name: [results.value_of(each, key, compared.from_step) for each in arm.runs] for arm in compared.arms}
    arms = [arm for arm in compared.arms if any(value is not None for value in values[arm.name])]
    _require(bool(arms), f"final:{key}")
    share = _is_share(key)

    def row(arm: Arm) -> tuple[list[float], intervals.Estimate]:
        found = [value for value in values[arm.name] if value is not None]
        split = results.column_of(key)
        if split is None:
            return found, intervals.of_mean(found)
        episodes = [rows[-1]["episodes"] for each in arm.runs if (rows := each.evaluated(*split))]
        return found, intervals.of_success(found, episodes)

    rows = [(arm, *row(arm)) for arm in arms]
    return Panel(_title(compared, key), lambda axes: _rows(axes, compared, rows, share, None), len(rows))


def _difference_panel(compared: Comparison, key: str) -> Panel:
    rows = []
    base = results.by_seed(compared.reference, key, compared.from_step)
    for arm in compared.arms:
        values, estimate = intervals.paired(results.by_seed(arm, key, compared.from_step), base)
        if arm is not compared.reference and estimate:
            rows.append((arm, [*values.values()], estimate))
    _require(bool(rows), f"differences:{key}")
    title = f"{_title(compared, key)}: difference from {compared.reference.name}"
    return Panel(title, lambda axes: _rows(axes, compared, rows, _is_share(key), 0.0), len(rows))


def _rows(axes: Axes, compared: Comparison, rows, share: bool, zero: float | None) -> None:
    """A row for each (arm, dots, estimate), the first at the top; `zero` draws a line there."""
    if zero is not None:
        axes.axvline(zero, color="black", linewidth=0.8)
    for y, (arm, dots, estimate) in enumerate(rows):
        color = compared.look(arm).color
        axes.plot(dots, [y + 0.24] * len(dots), "o", color=color, markersize=2.6, alpha=0.6, markeredgewidth=0)
        if estimate.low is not None:
            axes.plot([estimate.low, estimate.high], [y, y], color=color, linewidth=1.6, solid_capstyle="butt")
        axes.plot([estimate.mean], [y], "|", color=color, markersize=9, markeredgewidth=2.2)
    axes.set_yticks(range(len(rows)), [arm.name for arm, *_ in rows])
    for tick, (arm, *_) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(compared.look(arm).color)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    if share and zero is None:
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    elif share:
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+.3g}" if abs(value) > 1e-9 else "0")
        axes.set_xlabel("percentage points")


def _scatter_panel(compared: Comparison, key: str) -> Panel:
    found = results.scatter(compared.runs, key, compared.from_step)
    _require(found["runs"] > 0, f"scatter:{key}")

    def draw(axes: Axes) -> None:
        points = iter(zip(found["x"], found["y"], strict=True))
        for arm in compared.arms:
            whole = [(x, y) for x, y in (next(points) for _ in arm.runs) if x is not None and y is not None]
            x, y = [x for x, _ in whole], [y for _, y in whole]
            color = compared.look(arm).color
            axes.plot(x, y, "o", color=color, markersize=3.6, alpha=0.8, markeredgewidth=0, label=arm.name)
        _percent(axes)
        axes.set_xlim(left=0)
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(_title(compared, key))
        axes.set_ylabel("final success")
        if len(compared.arms) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False, handletextpad=0.1,
                        labelcolor="linecolor")  # fmt: skip

    r = found["r"]
    text = f"r = {r['mean']:.2f} [{r['low']:.2f}, {r['high']:.2f}], " if r else ""
    return Panel(f"Final success against {_title(compared, key)}\n{text}{found['runs']} runs", draw)


# --------------------------------------------------------------------


def _key(compared: Comparison, name: str) -> str:
    """The key of `results.value_of` that a user means; by default that of the first evaluations, or of training success.

    Raises:
        UserError: there is none.
    """
    columns = [results.column_key(column) for column in results.columns_of(compared.runs)]
    keys = [*columns, *(f"best {column}" for column in columns), *(measure.key for measure in MEASURES)]
    for short, split in SPLITS.items():
        name = name.replace(short, split)
    if name and name not in keys:
        raise UserError(f"there is no measure {name!r}{nearest(name, keys)}; choose from {', '.join(keys)}.")
    return name or (columns[0] if columns else "train_success")


def _title(compared: Comparison, key: str) -> str:
    for measure in MEASURES:
        if measure.key == key:
            return measure.title
    best = "Best success" if key.startswith("best ") else "Success"
    return f"{best}, {results.column_title(results.column_of(key), compared.runs)}"


def _is_share(key: str) -> bool:
    return all(measure.key != key or measure.unit == "share" for measure in MEASURES)


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise UserError(f"no run has what the panel {name!r} shows; leave it out.")


def _smooth(points: Sequence[tuple[int, float]], width: int) -> list[tuple[int, float]]:
    """Each value as the mean of the last `width`, of fewer at the start."""
    return [
        (step, fmean(value for _, value in points[max(0, end + 1 - width) : end + 1])) for end, (step, _) in enumerate(points)
    ]
