"""Groups runs into arms, the groups that a comparison compares, and names them by what differs."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from epo_jax.analysis.read import Run
from epo_jax.common.errors import UserError
from epo_jax.runs.folder import RESUME_MAY_CHANGE
from epo_jax.settings.table import SETTINGS

# As many settings as a name holds.
_IN_A_NAME = 3


class Arm(NamedTuple):
    """Runs that are repetitions of each other."""

    name: str
    runs: list[Run]


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Runs in arms, in the order of their first runs: those of one given name, and those that differ by nothing but the seed."""
    groups: dict[Any, list[Run]] = {}
    for i, each in enumerate(runs):
        key = each.arm or (json.dumps(settings(each), sort_keys=True) if each.config else i)
        groups.setdefault(key, []).append(each)
    members = list(groups.values())
    named_by = naming_keys([settings(group[0]) for group in members if group[0].config and not group[0].arm])
    names = [_name(group, named_by) for group in members]
    # Where the settings in a name are not enough to distinguish arms, their folders are.
    unique = [f"{name} ({group[0].name})" if names.count(name) > 1 else name for name, group in zip(names, members, strict=True)]
    return [Arm(name, group) for name, group in zip(unique, members, strict=True)]


def reference_arm(arms: Sequence[Arm], name: str | None) -> Arm:
    """The arm that the others are compared with: the one named, or else the first.

    Raises:
        UserError: no arm has the name.
    """
    if name is None:
        return arms[0]
    found = next((arm for arm in arms if arm.name == name), None)
    if found is None:
        names = ", ".join(repr(arm.name) for arm in arms)
        raise UserError(f"--reference={name}: no arm has this name; choose one of {names}.")
    return found


def settings(each: Run) -> dict[str, Any]:
    """The settings that decide the result of a run, without the seed."""
    return {key: value for key, value in each.config.items() if key != "seed" and key not in RESUME_MAY_CHANGE}


def differing_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The settings that all configs have and that are not the same in all."""
    shared = set.intersection(*map(set, configs)) if configs else set()
    return sorted(key for key in shared if len({json.dumps(config[key]) for config in configs}) > 1)


def naming_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The settings that arms are named by: all that differ if they are few, or else as few as distinguish the arms.

    The method is among them if it differs. Of settings that distinguish equally many arms, those of `epo` are taken first.
    """
    differing = sorted(differing_keys(configs), key=lambda key: (key != "algo.name", not key.startswith("epo."), key))
    if len(differing) <= _IN_A_NAME:
        return differing
    chosen = differing[: differing[0] == "algo.name"]
    while _distinguished(configs, chosen) < _distinguished(configs, differing):
        chosen.append(max(differing, key=lambda key: _distinguished(configs, [*chosen, key])))
    return chosen if len(chosen) <= _IN_A_NAME else []


def _distinguished(configs: Sequence[dict[str, Any]], keys: list[str]) -> int:
    return len({json.dumps([config[key] for key in keys]) for config in configs})


def _name(group: list[Run], keys: list[str]) -> str:
    first = group[0]
    if first.arm:
        return first.arm
    if first.config and keys:
        return ", ".join(setting_text(key, first.config[key]) for key in keys)
    return first.name if len(group) == 1 else f"{first.name} and {len(group) - 1} more"


_LEAVES = Counter(key.rpartition(".")[2] for key in {setting.key for setting in SETTINGS})


def setting_text(key: str, value: Any) -> str:
    """A setting as part of a name: "lam 0.01", "train.steps 8" (its section only if others have the key too), "ppo+epo"."""
    leaf = key.rpartition(".")[2]
    text = "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if key == "algo.name" else f"{key if _LEAVES[leaf] > 1 else leaf} {text}"
