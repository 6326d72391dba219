"""What the panels of a comparison share: its arms and their colors, axes of shares, names and titles."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from epo_jax.analysis.arms import Arm
from epo_jax.analysis.columns import column_of
from epo_jax.analysis.measures import BY_KEY
from epo_jax.analysis.read import Run
from epo_jax.common.errors import UserError

# Okabe and Ito's palette without yellow, for any color vision; line styles tell arms apart without color.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f7f7f")
STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), (0, (8, 2)), (0, (1, 2)))
GREY, RULE = "#5c5c5c", "#e6e6e6"


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


def percent(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


def write_name(axes: Axes, name: str, end: float, color: str) -> None:
    """A name to the right of the axes, at the height of `end`."""
    axes.annotate(name, (1, end), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                  va="center", fontsize=7, color=color, annotation_clip=False)  # fmt: skip


def title_of(compared: Comparison, key: str) -> str:
    if key in BY_KEY:
        return BY_KEY[key].title
    best = "Best success" if key.startswith("best ") else "Success"
    return f"{best}, {column_of(key).title(compared.runs)}"


def is_share(key: str) -> bool:
    return key not in BY_KEY or BY_KEY[key].unit == "share"


def require(holds: bool, name: str) -> None:
    if not holds:
        raise UserError(f"no run has what the panel {name!r} shows; leave it out.")
