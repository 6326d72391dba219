"""From a sweep's config to its members: which coefficients each of them has, and which of them share a program.

    config.sweep.arms              values of algo.name
    config.sweep.seeds             values of seed
    config.sweep.over.epo.lam    values of a coefficient, and so on for every key of `COEFFICIENTS`; () leaves it alone

Every arm is run with every seed and every combination of values. A member is an ordinary run: its config is the sweep's, with
one value for each of these keys, and `python -m epo_jax.main` on it would do the same.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from epo_jax.common.errors import UserError
from epo_jax.objectives.spec import Hyper, ObjectiveConfig
from epo_jax.settings.config import base_config, flatten
from epo_jax.settings.sweep import COEFFICIENTS
from epo_jax.settings.validate import validate
from epo_jax.training.from_config import objective_and_hyper

KINDS = ("grid", "list", "random")


class Member(NamedTuple):
    """One run of a sweep.

    Attributes:
        config: its whole config, as `epo_jax.main` takes it.
        coefficients: what tells it from others, by key: the arm, the seed, and what is swept.
    """

    name: str
    config: ConfigDict
    coefficients: dict[str, str | int | float]
    objective: ObjectiveConfig
    hyper: Hyper


def programs(config: ConfigDict) -> list[list[Member]]:
    """The members of the sweep that `config` asks for, those of one program together.

    Arms that differ in coefficients alone share a program. Members that differ only in what their arm does not read are one.

    Raises:
        UserError: a value that is impossible, or one that would change the program.
    """
    sweep = config.sweep
    if sweep.kind not in KINDS:
        raise UserError(f"config.sweep.kind={sweep.kind!r} is not known; choose one of {', '.join(map(repr, KINDS))}.")
    if not sweep.seeds:
        raise UserError("config.sweep.seeds is empty; name at least one seed.")
    swept = {key: values for key, values in flatten(sweep.over).items() if values}
    for key in swept:
        refuse_static(key)
    combinations = list(_combinations(sweep, swept))
    grouped: dict[ObjectiveConfig, list[Member]] = {}
    seen = set()
    for arm in sweep.arms or (config.algo.name,):
        for key, values in swept.items():
            _refuse_change_of_program(config, arm, key, values)
        for values in combinations:
            for seed in sweep.seeds:
                member = _member(config, {"algo.name": arm, **values, "seed": seed})
                read = member.hyper if member.objective.estimator == "gae" else member.hyper._replace(critic_lr=0.0)
                same = member.objective, tuple(map(float, read)), seed
                if same not in seen:
                    grouped.setdefault(member.objective, []).append(member)
                    seen.add(same)
    return list(grouped.values())


def refuse_static(key: str) -> None:
    """Raises UserError for a key that no two members may differ in."""
    if key not in COEFFICIENTS:
        known = {*flatten(base_config("alfworld")), *flatten(base_config("scienceworld"))}
        if key in known:
            raise UserError(
                f"config.sweep.over.{key}: config.{key} changes the program that all members share, so it cannot be swept; "
                "give each of its values a sweep of its own, or where config.algo.name can express it, an arm."
            )
        raise UserError(f"config.sweep.over.{key} is not a coefficient; choose from {', '.join(COEFFICIENTS)}.")


def _refuse_change_of_program(config: ConfigDict, arm: str, key: str, values: tuple) -> None:
    objectives = [_member(config, {"algo.name": arm, key: value}).objective for value in values]
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
            told = ", ".join(f"{n} of {key}" for key, n in lengths.items())
            raise UserError(f"config.sweep.kind='list' takes as many values of each key, not {told}.")
        points = zip(*swept.values(), strict=True) if swept else [()]
    else:
        for key, values in swept.items():
            if len(values) != 2 or values[0] >= values[1]:
                raise UserError(f"config.sweep.over.{key}={values}: config.sweep.kind='random' takes (lowest, highest).")
        points = _draws(sweep.samples, list(swept.values()))
    for point in points:
        yield dict(zip(swept, map(float, point), strict=True))


def _draws(samples: int, bounds: list[tuple[float, float]]) -> Iterator[list[float]]:
    for uniform in np.random.default_rng(0).random((samples, len(bounds))):
        yield [
            float(low * (high / low) ** u if low > 0 else low + u * (high - low))
            for u, (low, high) in zip(uniform, bounds, strict=True)
        ]


def _member(config: ConfigDict, values: dict) -> Member:
    own = ConfigDict({key: value for key, value in config.to_dict().items() if key != "sweep"})
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        (own[section] if section else own)[leaf] = value
    validate(own)
    objective, hyper = objective_and_hyper(own)
    arm, seed = values["algo.name"], values.get("seed", config.seed)
    leaves = [key.rpartition(".")[2] for key in values]
    told = [
        f"{leaf if leaves.count(leaf) == 1 else key}{value:g}"
        for leaf, (key, value) in zip(leaves, values.items(), strict=True)
        if key not in ("algo.name", "seed")
    ]
    return Member("-".join([arm, *told, f"seed{seed}"]), own.lock(), values, objective, hyper)
