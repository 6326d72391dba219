"""The columns of the paper's table of hyperparameters: PPO's, and GRPO's for every other base algorithm.

In a config that follows the paper, the keys that differ between the columns (`Setting.ppo`) have the value for `algo.name` until
they are set. Config files are evaluated before the command line, so these values are lazy references to `algo.name`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from epo_jax.settings.config import settings_of


class _Operation(NamedTuple):
    """What a lazy value applies: `fn(value, *args)`, references among `args` resolved."""

    fn: Callable[[Any, str], Any]
    args: tuple[config_dict.FieldReference, ...]


class ByMethod(config_dict.FieldReference):
    """A value of a config that follows `algo.name`, until it is set."""

    def __init__(self, name: config_dict.FieldReference, ppo: Any, others: Any):
        super().__init__(others, op=_Operation(lambda others, name: ppo if is_ppo(name) else others, (name,)))
        self.follows = True

    def set(self, value: Any, type_safe: bool = True) -> None:
        self.follows = False
        super().set(value, type_safe)


def is_ppo(name: str) -> bool:
    """Whether a method has the column of PPO."""
    return name.split("+")[0] == "ppo"


def follow_method(config: ConfigDict) -> None:
    """Makes the keys that differ between the paper's columns follow `algo.name`, until they are set."""
    env, name = config.env.name, config.algo.get_ref("name")
    for setting in settings_of(env):
        if env in setting.ppo:
            section, _, leaf = setting.key.rpartition(".")
            config[section][leaf] = ByMethod(name, setting.ppo[env], setting.default_for(env))


def column_line(config: ConfigDict) -> str | None:
    """A line on the column that a config follows and the keys that have its values; None for a config that follows none."""
    sections = {name: section for name, section in config.items() if isinstance(section, ConfigDict)}
    following = {
        f"{name}.{leaf}": value.get()
        for name, section in sections.items()
        for leaf, value in section.items(preserve_field_references=True)
        if isinstance(value, ByMethod) and value.follows
    }
    if not following:
        return None
    column = "PPO" if is_ppo(config.algo.name) else "GRPO"
    values = ", ".join(f"{key}={value!r}" for key, value in following.items())
    return f"the paper's column for {column} (config.algo.name={config.algo.name!r}): {values}"
