"""The panels of a comparison of arms.

A panel is named by what it shows:

    OOD, IID, OOD@1          success at each evaluation (at temperature 1), with the 95 % interval of the mean over runs;
                             OOD+reference: by the reference implementation's rule for "won" (ScienceWorld)
    success, entropy, ...    a curve of the report (`curves.CURVES`) over RL steps, with the t interval of the mean
    corridor                 entropy in its corridor, a panel for each arm
    final[:MEASURE]          success at the end, or a measure: each run, and the mean with its interval
    differences[:MEASURE]    differences from the reference arm by seed, with the t interval
    scatter[:MEASURE]        a measure of each run against its final success, with Pearson's r, also within arms
    by:SETTING[:MEASURE]     success at the end, or a measure, by a setting such as epo.lam, a line for each other difference

MEASURE is OOD, "best OOD", OOD@1, or a key such as roughness, change_std, highest_ratio; docs/metrics.md explains them. Thin
lines and dots are runs, thick lines means.
"""

from epo_jax.analysis import curves
from epo_jax.analysis.columns import SHORT, columns_of
from epo_jax.analysis.comparison import Comparison, Panel
from epo_jax.analysis.measures import MEASURES
from epo_jax.analysis.run_panels import difference_panel, final_panel, scatter_panel, setting_panel
from epo_jax.analysis.step_panels import corridor_panels, curve_panel, success_panel
from epo_jax.common.errors import UserError, nearest


def panels_of(compared: Comparison, name: str) -> list[Panel]:
    """The panels of one name.

    Raises:
        UserError: no panel is called so, or no run has what it shows.
    """
    kind, _, key = name.partition(":")
    found = {curve.key: curve for curve in curves.CURVES}
    columns = {column.key: column for column in columns_of(compared.runs)}
    if _long(name) in columns:
        panels = [success_panel(compared, columns[_long(name)])]
    elif name[:3] in SHORT:
        panels = []
    elif name in found:
        panels = [curve_panel(compared, found[name])]
    elif name == "corridor":
        panels = corridor_panels(compared)
    elif kind == "final":
        panels = [final_panel(compared, _key(compared, key))]
    elif kind == "differences":
        panels = [difference_panel(compared, _key(compared, key))]
    elif kind == "by":
        setting, _, measure = key.partition(":")
        panels = [setting_panel(compared, setting, _key(compared, measure))]
    elif kind == "scatter":
        panels = [scatter_panel(compared, _key(compared, key or "change_std"))]
    else:
        kinds = [*SHORT, *found, "corridor", "final", "differences", "scatter", "by"]
        raise UserError(f"there is no panel {name!r}{nearest(name, kinds)}; choose from {', '.join(kinds)}.")
    if not panels:
        raise UserError(f"no run has what the panel {name!r} shows; leave it out.")
    return panels


def _key(compared: Comparison, name: str) -> str:
    """The key of `results.value_of` that a user means; by default that of the first evaluations, or of training success.

    Raises:
        UserError: there is none.
    """
    columns = [column.key for column in columns_of(compared.runs)]
    keys = [*columns, *(f"best {column}" for column in columns), *(measure.key for measure in MEASURES)]
    name = _long(name)
    if name and name not in keys:
        raise UserError(f"there is no measure {name!r}{nearest(name, keys)}; choose from {', '.join(keys)}.")
    return name or (columns[0] if columns else "train_success")


def _long(name: str) -> str:
    """A name with the splits in full: "valid_unseen@1" for "OOD@1"."""
    for short, split in SHORT.items():
        name = name.replace(short, split)
    return name
