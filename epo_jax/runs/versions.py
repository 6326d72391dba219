"""Run folders of earlier versions, read as if this one had written them.

config.json says in `version` which version of the format wrote it; without one it is 1. When a key of the config, or a field of
`TrainState`, is added, removed or renamed, add it here; docs/architecture.md says how.
"""

from collections.abc import Callable
from typing import Any

from epo_jax.settings.config import ENV_SECTIONS

VERSION = 2

# Keys added after a version, with the value that reproduces what that version did, or a function to it from the other keys.
KEYS_ADDED: dict[int, dict[str, Any]] = {
    1: {
        "init_from.run": "", "init_from.step": -1, "init_from.state": "weights",
        "warm_start.lost": True,
        "algo.old_log_prob": "sampler",
    },
}

# Keys removed after a version: the key that took its place, or None if nothing did.
KEYS_REMOVED: dict[int, dict[str, str | None]] = {
    1: {},
}

# Fields added to `TrainState`, with what a checkpoint without them stands for: (abstract field) -> field.
STATE_ADDED: dict[str, Callable[[Any], Any]] = {}


def upgrade(keys: dict[str, Any], version: int) -> tuple[dict[str, Any], list[str]]:
    """The keys of a config.json of `version`, by dotted name, as those of today, and a sentence on each that has gone."""
    keys, told = {key: value for key, value in keys.items() if key != "version"}, []
    env = ENV_SECTIONS.get(keys.get("env.name"), dict)()
    for before in range(version, VERSION):
        for old, new in KEYS_REMOVED.get(before, {}).items():
            if old in keys:
                value = keys.pop(old)
                if new is None:
                    told.append(f"config.{old}={value!r} of an earlier version has no meaning any more")
                else:
                    keys[new] = value
        for key, value in KEYS_ADDED.get(before, {}).items():
            if key not in keys and (not key.startswith("env.") or key[4:] in env):
                keys[key] = value(keys) if callable(value) else value
    return keys, told
