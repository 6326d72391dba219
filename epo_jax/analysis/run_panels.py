"""Panels of numbers of runs: their ends, differences by seed, a measure against success, and a measure by a setting."""

from matplotlib.axes import Axes

from epo_jax.analysis import intervals, results
from epo_jax.analysis.arms import Arm, naming_keys, setting_text, settings
from epo_jax.analysis.columns import column_of
from epo_jax.analysis.comparison import COLORS, RULE, STYLES, Comparison, Panel, is_share, percent, require, title_of, write_name
from epo_jax.common.errors import UserError


def final_panel(compared: Comparison, key: str) -> Panel:
    rows = [(arm, *found) for arm in compared.arms if (found := _ends(compared, arm, key))]
    require(bool(rows), f"final:{key}")
    return Panel(title_of(compared, key), lambda axes: _rows(axes, compared, rows, is_share(key), None), len(rows))


def _ends(compared: Comparison, arm: Arm, key: str) -> tuple[list[float], intervals.Estimate] | None:
    """A key of `results.value_of` of each run of an arm, and their mean with its interval; None if no run has it."""
    found = [(each, value) for each in arm.runs if (value := results.value_of(each, key, compared.from_step)) is not None]
    values, column = [value for _, value in found], column_of(key)
    if not found:
        return None
    if column is None:
        return values, intervals.of_mean(values)
    return values, intervals.of_success(values, [column.evaluations(each)[-1]["episodes"] for each, _ in found])


def difference_panel(compared: Comparison, key: str) -> Panel:
    rows = []
    base = results.by_seed(compared.reference, key, compared.from_step)
    for arm in compared.arms:
        values, estimate = intervals.paired(results.by_seed(arm, key, compared.from_step), base)
        if arm is not compared.reference and estimate:
            rows.append((arm, [*values.values()], estimate))
    require(bool(rows), f"differences:{key}")
    title = f"{title_of(compared, key)}: difference from {compared.reference.name}"
    return Panel(title, lambda axes: _rows(axes, compared, rows, is_share(key), 0.0), len(rows))


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


def scatter_panel(compared: Comparison, key: str) -> Panel:
    found = results.scatter(compared.arms, key, compared.from_step)
    require(found["runs"] > 0, f"scatter:{key}")

    def draw(axes: Axes) -> None:
        points = iter(zip(found["x"], found["y"], strict=True))
        for arm in compared.arms:
            whole = [(x, y) for x, y in (next(points) for _ in arm.runs) if x is not None and y is not None]
            x, y = [x for x, _ in whole], [y for _, y in whole]
            color = compared.look(arm).color
            axes.plot(x, y, "o", color=color, markersize=3.6, alpha=0.8, markeredgewidth=0, label=arm.name)
        percent(axes)
        axes.set_xlim(left=0)
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(title_of(compared, key))
        axes.set_ylabel("final success")
        if len(compared.arms) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False, handletextpad=0.1,
                        labelcolor="linecolor")  # fmt: skip

    texts = [f"{found['runs']} runs"]
    for name, r in (("r", found["r"]), ("r within arms", found["within"])):
        texts += [f"{name} = {r['mean']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"] if r else []
    return Panel(f"Final success against {title_of(compared, key)}\n{', '.join(texts)}", draw)


def setting_panel(compared: Comparison, setting: str, key: str) -> Panel:
    """Lines over the values of a setting, one for the arms that are alike in all else by which arms are named."""
    arms = [arm for arm in compared.arms if setting in arm.runs[0].config]
    others = [name for name in naming_keys([settings(arm.runs[0]) for arm in arms]) if name != setting]
    lines: dict[str, list[tuple[float, list[float], intervals.Estimate]]] = {}
    for arm in arms:
        config = arm.runs[0].config
        label = ", ".join(setting_text(name, config[name]) for name in others)
        if found := _ends(compared, arm, key):
            lines.setdefault(label, []).append((config[setting], *found))
    require(any(len(points) > 1 for points in lines.values()), f"by:{setting}:{key}")
    values = sorted({x for points in lines.values() for x, *_ in points})
    if not all(isinstance(value, int | float) for value in values):
        raise UserError(f"the panel 'by:{setting}' needs a setting that is a number.")

    def draw(axes: Axes) -> None:
        if values[0] > 0 and values[-1] >= 10 * values[0]:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xticks(values, [f"{value:g}" for value in values])
        for n, (label, points) in enumerate(lines.items()):
            points, color = sorted(points, key=lambda point: point[0]), COLORS[n % len(COLORS)]
            x, means = [x for x, *_ in points], [estimate.mean for *_, estimate in points]
            for at, dots, estimate in points:
                axes.plot([at] * len(dots), dots, "o", color=color, markersize=2.6, alpha=0.5, markeredgewidth=0)
                if estimate.low is not None:
                    axes.plot([at, at], [estimate.low, estimate.high], color=color, linewidth=1.2)
            axes.plot(x, means, color=color, linestyle=STYLES[n % len(STYLES)], linewidth=1.6, marker="o", markersize=4)
            write_name(axes, label, means[-1], color)
        if is_share(key):
            percent(axes)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(setting)

    return Panel(title_of(compared, key), draw)
