"""The curves of a run, as PNG files: success, and entropy with its corridor."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epo_jax.common.errors import UserError
from epo_jax.runs.metrics import Row, at_another_temperature, read_rows, steps_taken
from epo_jax.runs.subject import subject
from epo_jax.settings.config import flatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which can be told apart with any color vision; each split also has its own marker.
_GREY, _BLUE, _ORANGE, _GREEN = "#7f7f7f", "#0072B2", "#D55E00", "#009E73"
_SPLITS = {"valid_unseen": (_ORANGE, "s"), "valid_seen": (_BLUE, "o"), "train": (_GREEN, "^")}


def draw(workdir: Path) -> list[Path]:
    """Writes success.png and entropy.png under `workdir`/figures; the paths.

    Raises:
      UserError: the folder has neither metrics.jsonl nor eval.jsonl.
    """
    workdir = Path(workdir)
    metrics, evaluations = read_rows(workdir / "metrics.jsonl"), read_rows(workdir / "eval.jsonl")
    evaluations = [row for row in evaluations if not at_another_temperature(row)]
    if not metrics and not evaluations:
        raise UserError(f"{workdir} has no metrics.jsonl or eval.jsonl with rows; name the folder of a run.")
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    about = subject(_config(workdir), read_rows(workdir / "processes.jsonl"))
    steps = steps_taken(metrics, evaluations)
    return [
        _save(folder / "success.png", about, steps, lambda axes: _success(axes, metrics, evaluations)),
        _save(folder / "entropy.png", about, steps, lambda axes: _entropy(axes, metrics)),
    ]


def _config(workdir: Path) -> dict[str, Any]:
    """The settings in `workdir`, which a title can do without."""
    try:
        return flatten(json.loads((workdir / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return {}


def _save(path: Path, about: str, steps: int, plot: Callable[["Axes"], None]) -> Path:
    # Imported here, as no command draws before its end. Figure without pyplot: no global state, no display, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("RL step")
    plot(axes)
    margin = 0.02 * max(steps, 1)
    axes.set_xlim(-margin, max(steps, 1) + margin)
    figure.suptitle(about, x=0.01, ha="left", fontsize="small", color=_GREY)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="best")
    figure.savefig(path)
    return path


def _success(axes: "Axes", metrics: Sequence[Row], evaluations: Sequence[Row]) -> None:
    axes.set_title("Success", loc="left")
    axes.set_ylabel("share of episodes won")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    points = [(row["step"], row["success"]) for row in metrics if row.get("success") is not None]
    if points:
        steps, success = zip(*points, strict=True)
        axes.plot(steps, success, color=_GREY, linewidth=0.8, alpha=0.55)
        axes.plot(steps, _smooth(success, 7), color=_GREY, linewidth=1.8, label="training episodes (mean of 7 steps)")
    splits = list(dict.fromkeys(row["split"] for row in evaluations))
    for position, split in enumerate(splits):
        rows = sorted((row for row in evaluations if row["split"] == split), key=lambda row: row["step"])
        color, marker = _SPLITS.get(split, (_GREEN, "D"))
        # Splits are evaluated at the same steps: half a percent of the axis keeps their intervals apart.
        shift = (position - (len(splits) - 1) / 2) * 0.006 * max(row["step"] for row in evaluations)
        middle = [row["success"] for row in rows]
        axes.errorbar(
            [row["step"] + shift for row in rows],
            middle,
            yerr=(
                [max(0.0, row["success"] - row["low"]) for row in rows],
                [max(0.0, row["high"] - row["success"]) for row in rows],
            ),
            color=color,
            marker=marker,
            markersize=5,
            linewidth=1.5,
            elinewidth=1.0,
            capsize=3,
            label=f"{split}, all {rows[-1]['episodes']} episodes (95 % interval)",
        )


def _entropy(axes: "Axes", metrics: Sequence[Row]) -> None:
    axes.set_title("Entropy of the sampled tokens and its corridor", loc="left")
    axes.set_ylabel("nats per token")
    points = [(row["step"], row["entropy"]) for row in metrics if row.get("entropy") is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=_BLUE, linewidth=1.8, label="mean entropy of the step")
    inside = [row for row in metrics if row.get("corridor_low") is not None and row.get("corridor_high") is not None]
    if inside:
        steps = [row["step"] for row in inside]
        low, high = [row["corridor_low"] for row in inside], [row["corridor_high"] for row in inside]
        axes.fill_between(steps, low, high, color=_ORANGE, alpha=0.13, linewidth=0, label="corridor")
        axes.plot(steps, low, color=_ORANGE, linewidth=1.0, linestyle="--")
        axes.plot(steps, high, color=_ORANGE, linewidth=1.0, linestyle="--")
    axes.set_ylim(bottom=0)


def _smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last `width` values, of fewer at the start."""
    return [sum(values[max(0, end - width) : end]) / min(width, end) for end in range(1, len(values) + 1)]
