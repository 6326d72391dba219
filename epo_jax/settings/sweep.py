"""The section `sweep` of a config: which runs a sweep has."""

from ml_collections import ConfigDict

from epo_jax.settings.table import SETTINGS, SWEEP

# Every key that the members of a sweep may differ in, besides algo.name and seed.
COEFFICIENTS = tuple(setting.key for setting in SETTINGS if setting.traced)


def sweep_section() -> ConfigDict:
    """The section `sweep` of a config: one member, until a key has several values."""
    over: dict[str, dict[str, tuple]] = {}
    for key in COEFFICIENTS:
        section, _, leaf = key.partition(".")
        over.setdefault(section, {})[leaf] = ()
    return ConfigDict({**{setting.key.removeprefix("sweep."): setting.default for setting in SWEEP.settings}, "over": over})
