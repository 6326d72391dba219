"""The section `sweep` of a config: which runs a sweep has."""


from ml_collections import ConfigDict

from epo_jax.objectives.loss import Hyper
from epo_jax.settings.config import base_config, flatten

_SECTIONS = ("epo", "algo", "control")


# Coefficients whose field of Hyper has another name, or whose section has only one.
_RENAMED = ("algo.gamma", "optim.lr")


# Every key that members may differ in, beside their arm and seed: what a compiled program takes as data.
COEFFICIENTS = tuple(
    key for key in flatten(base_config()) if key in _RENAMED
    or (key.partition(".")[0] in _SECTIONS and key.partition(".")[2] in Hyper._fields)
)  # fmt: skip


def sweep_section() -> ConfigDict:
    """The section `sweep` of a config: one member, until something has several values."""
    sweep = ConfigDict()
    sweep.arms = ()  # algo.name of each arm; () = that of the config
    sweep.seeds = (0,)
    # "grid": every combination of the values; "list": the first of every key's, the second of every key's and so on;
    # "random": `samples` draws between the two values of each key, evenly on a logarithmic scale where the lower is above 0
    sweep.kind = "grid"
    sweep.samples = 8
    sweep.at_once = 0  # members that are computed together; 0 = one on a CPU, all that a device has elsewhere
    sweep.devices = 0  # devices that the members of a program are spread over; 0 = as many as divide their number
    sweep.over = values = ConfigDict()
    for key in COEFFICIENTS:
        section, _, leaf = key.partition(".")
        values[section] = values.get(section, ConfigDict())
        values[section][leaf] = ()
    return sweep
