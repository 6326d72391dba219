"""From a sweep's config to its members, grouped by program.

    config.sweep.arms              values of algo.name
    config.sweep.seeds             values of seed
    config.sweep.over.epo.lam      values of a coefficient, and so on for every key of `COEFFICIENTS`; () leaves it alone

Every method is run with every seed and every combination of values. A member is an ordinary run: its config is the config of the
sweep with one value for each of these keys, and `epo-jax train` with that config computes the same.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from epo_jax.common.errors import UserError
from epo_jax.objectives.spec import ObjectiveConfig
from epo_jax.runs.ledger import Member
from epo_jax.settings.config import flatten
from epo_jax.settings.sweep import COEFFICIENTS
from epo_jax.settings.table import SETTINGS
from epo_jax.settings.validate import validate
from epo_jax.training.from_config import objective_and_hyper

# Coefficients that are whole numbers.
_WHOLE = {setting.key for setting in SETTINGS if setting.traced and isinstance(setting.default, int)}


def programs(config: ConfigDict) -> list[list[Member]]:
    """The members of a sweep, grouped by the objective that they compile.

    Methods that differ in coefficients alone share a program. Two members that differ only in what their method does not read
    are one.

    Raises:
        UserError: a value that is impossible, or one that would change the program.
    """
    sweep = config.sweep
    if not sweep.seeds:
        raise UserError("config.sweep.seeds is empty; name at least one seed.")
    swept = {key: values for key, values in flatten(sweep.over).items() if values}
    for key in swept:
        refuse_static(key)
    swept = {key: tuple(_number(key, value) for value in values) for key, values in swept.items()}
    combinations = list(_combinations(sweep, swept))
    grouped: dict[ObjectiveConfig, list[Member]] = {}
    seen = set()
    for method in sweep.arms or (config.algo.name,):
        for key, values in swept.items():
            _refuse_change_of_program(config, method, key, values)
        for values in combinations:
            for seed in sweep.seeds:
                member = _member(config, {"algo.name": method, **values, "seed": seed})
                read = member.hyper if member.objective.estimator == "gae" else member.hyper._replace(critic_lr=0.0)
                same = member.objective, tuple(map(float, read)), seed
                if same not in seen:
                    grouped.setdefault(member.objective, []).append(member)
                    seen.add(same)
    return list(grouped.values())


def refuse_static(key: str) -> None:
    """Raises UserError for a key that must be the same for all members."""
    if key not in COEFFICIENTS:
        if any(setting.key == key for setting in SETTINGS):
            raise UserError(
                f"config.sweep.over.{key}: config.{key} changes the program that all members share, so it cannot be swept; "
                "give each of its values a sweep of its own, or where config.algo.name can express it, a method."
            )
        raise UserError(f"config.sweep.over.{key} is not a coefficient; choose from {', '.join(COEFFICIENTS)}.")


def refuse_what_members_cannot_share(config) -> None:
    """Raises UserError for settings that only a single run can have."""
    sizes = {"rollout.devices": (config.rollout.devices, 1)} | {f"mesh.{axis}": (size, 0) for axis, size in config.mesh.items()}
    for key, (size, alone) in sizes.items():
        if size > 1:
            raise UserError(
                f"config.{key}={size} must be {alone} in a sweep, whose members are spread over devices instead "
                "(config.sweep.devices)."
            )
    if config.init_from.state == "everything" and config.init_from.run and config.init_from.step < 0:
        raise UserError(
            "config.init_from.step=-1 must be a number of RL steps in a sweep with config.init_from.state='everything', so that "
            "all members begin with the same one."
        )
    own_bases = (
        "{seed}" in config.init_from.run or not config.init_from.run and (config.warm_start.episodes or not config.model.path)
    )
    if config.model.lora_rank and len(set(config.sweep.seeds)) > 1 and own_bases:
        raise UserError(
            f"config.sweep.seeds={config.sweep.seeds}: with config.model.lora_rank members share their base, which would be "
            "another for each seed here; take one seed, one run in config.init_from.run, or a config.model.path with "
            "config.warm_start.episodes=0."
        )


def _number(key: str, value: Any) -> float:
    """A value of a coefficient. Raises UserError if it is of another type."""
    whole = key in _WHOLE
    if not isinstance(value, (int, float)) or (whole and value != round(value)):
        raise UserError(f"config.sweep.over.{key}: {value!r} must be {'a whole number' if whole else 'a number'}.")
    return int(value) if whole else float(value)


def _refuse_change_of_program(config: ConfigDict, method: str, key: str, values: tuple) -> None:
    objectives = [_member(config, {"algo.name": method, key: value}).objective for value in values]
    for value, objective in zip(values, objectives, strict=True):
        if objective != objectives[0]:
            raise UserError(
                f"config.sweep.over.{key}: {value} makes another program than {values[0]}, as a term is left out where "
                f"config.{key} is 0; keep to one side of it."
            )


def _combinations(sweep: ConfigDict, swept: dict[str, tuple]) -> Iterator[dict[str, float]]:
    """{key: value} for every point of the sweep."""
    if sweep.kind == "grid":
        points = itertools.product(*swept.values())
    elif sweep.kind == "list":
        lengths = {key: len(values) for key, values in swept.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{n} of {key}" for key, n in lengths.items())
            raise UserError(f"config.sweep.kind='list' takes as many values of each key, not {listed}.")
        points = zip(*swept.values(), strict=True) if swept else [()]
    else:
        for key, values in swept.items():
            if len(values) != 2 or values[0] >= values[1]:
                raise UserError(f"config.sweep.over.{key}={values}: config.sweep.kind='random' takes (lowest, highest).")
        points = _draws(sweep.samples, list(swept.values()))
    for point in points:
        yield {key: round(value) if key in _WHOLE else value for key, value in zip(swept, point, strict=True)}


def _draws(samples: int, bounds: list[tuple[float, float]]) -> Iterator[list[float]]:
    for uniform in np.random.default_rng(0).random((samples, len(bounds))):
        yield [
            float(low * (high / low) ** u if low > 0 else low + u * (high - low))
            for u, (low, high) in zip(uniform, bounds, strict=True)
        ]


def _member(config: ConfigDict, values: dict) -> Member:
    own = ConfigDict({key: value for key, value in config.to_dict().items() if key != "sweep"})
    own.update_from_flattened_dict(values)
    validate(own)
    objective, hyper = objective_and_hyper(own)
    method, seed = values["algo.name"], values.get("seed", config.seed)
    leaves = [key.rpartition(".")[2] for key in values]
    parts = [
        f"{leaf if leaves.count(leaf) == 1 else key}{value:g}"
        for leaf, (key, value) in zip(leaves, values.items(), strict=True)
        if key not in ("algo.name", "seed")
    ]
    name = "-".join([method, *parts, f"seed{seed}"])
    if own.checkpoint.folder:
        own.checkpoint.folder = f"{own.checkpoint.folder.rstrip('/')}/{name}"
    return Member(name, own.lock(), values, objective, hyper)
