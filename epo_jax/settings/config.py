"""The config of a run, as ml_collections has it: made from the table of settings."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from epo_jax.settings.setting import Setting
from epo_jax.settings.table import SECTIONS

# Environments with settings of their own.
ENVIRONMENTS = tuple(section.env for section in SECTIONS if section.env)


def base_config(env: str = "alfworld", **options: Any) -> ConfigDict:
    """Every key with its default for environment `env`.

    Args:
        env: "alfworld", "scienceworld", or an environment of your own.
        options: the keys of the section `env` that your own environment has besides `workers` and `max_turns`.
    """
    config: dict[str, Any] = {"env": {} if env in ENVIRONMENTS else options}
    for setting in settings_of(env):
        name, _, leaf = setting.key.rpartition(".")
        section = config.setdefault(name, {}) if name else config
        default = setting.default_for(env)
        section.setdefault(leaf, config_dict.placeholder(int) if default is None else default)
    config["env"]["name"] = env
    return ConfigDict(config)


def settings_of(env: str) -> list[Setting]:
    """The settings of a run in environment `env`."""
    return [setting for section in SECTIONS if section.env in ("", env) for setting in section.settings]


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"epo.lam": 0.001, ...}: every leaf under its dotted name."""
    leaves = {}
    for key in config.keys():
        value = config[key]
        if isinstance(value, (ConfigDict, Mapping)):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves
