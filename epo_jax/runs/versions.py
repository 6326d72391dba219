"""Reads run folders of earlier versions as if this version had written them.

`version` in config.json is the version of the format; without the key it is 1. When a key of the config is removed or
renamed, or a field of `TrainState` is added, add it here; docs/architecture.md explains how.
"""

from collections.abc import Callable
from typing import Any

from epo_jax.settings.config import settings_of
from epo_jax.settings.table import SETTINGS

VERSION = 4

# Keys added after a version (`Setting.added`), with the value that reproduces what that version did, or a function to it from the
# other keys.
KEYS_ADDED: dict[int, dict[str, Any]] = {
    version: {setting.key: setting.added[1] for setting in SETTINGS if setting.added and setting.added[0] == version}
    for version in range(1, VERSION)
}

# Keys removed after a version: the key that took its place, or None if nothing did.
KEYS_REMOVED: dict[int, dict[str, str | None]] = {
    1: {},
    2: {"algo.released_mini_turns": "algo.mini_batch_turns", "algo.released_micro_turns": "algo.micro_batch_turns"},
}

# Values renamed after a version, by key.
VALUES_RENAMED: dict[int, dict[str, dict[Any, Any]]] = {
    2: {"epo.phase": {"released": "two_stage"}},
}

# Fields added to `TrainState`, with their value for a checkpoint without them: (abstract field) -> field.
STATE_ADDED: dict[str, Callable[[Any], Any]] = {}


def upgrade(keys: dict[str, Any], version: int) -> tuple[dict[str, Any], list[str]]:
    """The keys of a config.json of `version`, by dotted name, as this version has them, and a note on each that is gone."""
    keys, notes = {key: value for key, value in keys.items() if key != "version"}, []
    known = {setting.key for setting in settings_of(keys.get("env.name", ""))}
    for before in range(version, VERSION):
        for old, new in KEYS_REMOVED.get(before, {}).items():
            if old in keys:
                value = keys.pop(old)
                if new is None:
                    notes.append(f"config.{old}={value!r} of an earlier version has no meaning any more")
                else:
                    keys[new] = value
        for key, renamed in VALUES_RENAMED.get(before, {}).items():
            keys[key] = renamed.get(keys.get(key), keys.get(key))
        for key, value in KEYS_ADDED.get(before, {}).items():
            if key not in keys and key in known:
                keys[key] = value(keys) if callable(value) else value
    return keys, notes
