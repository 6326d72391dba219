"""One picture of chosen panels (`panels`), as PNG, SVG or PDF, for documents and papers."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from epo_jax.analysis.comparison import GREY, Comparison
from epo_jax.analysis.panels import panels_of

FORMATS = (".png", ".svg", ".pdf")

# Inches; a panel is as wide as a column of a paper of two columns.
_WIDTH, _HEIGHT, _ROW = 3.4, 2.3, 0.24
_LETTERS, _LETTERS_ABOVE = 44, 62  # of a title and of the line above the panels, in that width
_FONTS = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "epo_jax",
}


def draw(compared: Comparison, names: Sequence[str], about: str, path: Path) -> Path:
    """Writes one picture with the panels `names`, in rows of up to three.

    Args:
        about: the line above the panels: game, model, seeds.
        path: ends in one of `FORMATS`.

    Raises:
        UserError: no panel is called so, or no run has what it shows.
    """
    panels = [panel for name in names for panel in panels_of(compared, name)]
    across = min(3, len(panels)) if len(panels) != 4 else 2
    rows = [panels[i : i + across] for i in range(0, len(panels), across)]
    heights = [max(0.75 + _ROW * panel.rows * (1 + (panel.rows < 3)) if panel.rows else _HEIGHT for panel in row) for row in rows]
    with matplotlib.rc_context(_FONTS):
        figure = Figure(figsize=(_WIDTH * across, sum(heights) + 0.3), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        # Each panel is laid out by itself, as some have names on the left and others on the right.
        parts = figure.subfigures(len(rows), across, height_ratios=heights, squeeze=False)
        for part, panel in zip(parts.flat, panels, strict=False):
            title = "\n".join(textwrap.fill(line, _LETTERS) for line in panel.title.splitlines())
            part.suptitle(title, x=0.02, ha="left", fontsize=8.5, fontweight="bold")
            panel.draw(part.add_subplot())
        figure.suptitle(textwrap.fill(about, _LETTERS_ABOVE * across), x=0.005, ha="left", fontsize=7.5, color=GREY)
        figure.draw_without_rendering()  # labels are moved apart where the layout has placed them
        for axes in figure.axes:
            _separate(axes)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _separate(axes: Axes) -> None:
    """Moves labels that would cover each other apart, and none out of the axes."""

    def height_of(label: Annotation) -> float:
        return axes.transData.transform((0, label.xy[1]))[1]

    box, size = axes.get_window_extent(), 8.5 * axes.figure.dpi / 72
    labels = sorted((text for text in axes.texts if isinstance(text, Annotation)), key=height_of)
    places = [height_of(label) for label in labels]
    for _ in range(200):
        places = [min(max(place, box.y0), box.y1) for place in places]
        for i in range(1, len(places)):
            overlap = max(0.0, size - (places[i] - places[i - 1]))
            places[i - 1], places[i] = places[i - 1] - overlap / 2, places[i] + overlap / 2
    for label, place in zip(labels, places, strict=True):
        label.set_position((4, (place - height_of(label)) * 72 / axes.figure.dpi))
