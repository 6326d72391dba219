"""The environment protocol, and environments by name.

An environment is a module with

    list_tasks(split, options)      -> list[Task]           every task of a split, in a fixed order
    make_env(options)               -> TextEnv              called inside a worker process

and optionally

    prepare(options)                -> None                 make or check everything on disk, once, in the main process
    demonstrations(tasks, options)  -> list[Demonstration]  expert episodes for the warm start
    rename(demonstrations, seed)    -> list[Demonstration]  the same episodes with other names (config.warm_start.copies)
    PHRASES = "regular expression"                          phrases that become one token in a tokenizer trained on its texts
    SLOTS_PER_WORKER = 32                                   most episodes per worker process

`config.env.name` is a name in `ENVIRONMENTS` or the import path of any other module. docs/environments.md builds one.

`options` is a plain dict (the `env` section of the config). A `Task` is a dict of JSON values with at least `id` (unique) and
`type` (a row of the table of success by type); the environment defines the rest: a game file, a variation, a seed.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, Protocol

from epo_jax.common.errors import UserError, nearest

Task = dict[str, Any]

SPLITS = ("train", "valid_seen", "valid_unseen")

ENVIRONMENTS = {
    "alfworld": "epo_jax.envs.alfworld.protocol",
    "scienceworld": "epo_jax.envs.scienceworld.protocol",
    "toy": "epo_jax.envs.toy",
}


@dataclasses.dataclass(frozen=True)
class Observation:
    """An observation after a reset or a step.

    Attributes:
        text: the observation, without the goal if the environment can separate them.
        goal: the task in words; the same at every turn of an episode.
        reward: reward of the last step (0 after a reset).
        done: the episode has ended in the environment (the caller applies turn limits).
        won: the task is completed.
        score: progress in [0, 100].
        admissible: the actions that are valid now, if the environment's options request them, else empty.
        objects: the objects that actions can name now, likewise.
        commands: after a reset, the forms of actions, if there is no list of admissible ones.
        won_reference: the episode is won by the rule of the authors' reference implementation; None where that is `won`.
    """

    text: str
    goal: str = ""
    reward: float = 0.0
    done: bool = False
    won: bool = False
    score: float = 0.0
    admissible: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    commands: str = ""
    won_reference: bool | None = None


_BLANK = vars(Observation(text=""))


def to_fields(observation: Observation) -> dict[str, Any]:
    """Returns an observation as a dict for JSON: the text, and all fields that differ from their defaults."""
    return {name: value for name, value in vars(observation).items() if name == "text" or value != _BLANK[name]}


def from_fields(fields: dict[str, Any]) -> Observation:
    """Inverse of `to_fields`. Raises TypeError for unknown fields."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Observation(**values)


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """An expert episode.

    Attributes:
        observations: `observations[i]` precedes `actions[i]`; one more follows the last action.
        mistakes: turns with deliberate mistakes, which behavior cloning must not imitate; they show the recovery after them.
    """

    task: Task
    observations: tuple[Observation, ...]
    actions: tuple[str, ...]
    mistakes: tuple[int, ...] = ()

    @property
    def goal(self) -> str:
        return self.observations[0].goal

    @property
    def won(self) -> bool:
        return self.observations[-1].won


class TextEnv(Protocol):
    """An environment: one live episode at a time, deterministic given task and actions, so that it can be replayed."""

    def reset(self, task: Task) -> Observation: ...

    def step(self, action: str) -> Observation: ...


@dataclasses.dataclass(frozen=True)
class Environment:
    """An environment module with defaults for what it omits; worker processes import `module`."""

    module: str
    list_tasks: Callable[[str, dict[str, Any]], list[Task]]
    make_env: Callable[[dict[str, Any]], TextEnv]
    prepare: Callable[[dict[str, Any]], None]
    narrowed: Callable[[dict[str, Any], str, int], dict[str, Any]]  # options that prepare less: one split up to task number
    demonstrations: Callable[[list[Task], dict[str, Any]], list[Demonstration]]
    rename: Callable[[list[Demonstration], int], list[Demonstration]]
    phrases: str
    slots_per_worker: int | None


def environment(name: str) -> Environment:
    """Returns the environment `name`. Raises UserError if it does not exist or lacks a required function."""
    module_name = ENVIRONMENTS.get(name, name)
    unknown = UserError(
        f"env.name={name!r} is not an environment; choose one of {', '.join(sorted(ENVIRONMENTS))}, "
        f"or name a module that can be imported from here{nearest(name, ENVIRONMENTS)}."
    )
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise unknown
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but one of its imports does not
        raise unknown from None
    for function in ("list_tasks", "make_env"):
        if not callable(getattr(module, function, None)):
            raise UserError(f"env.name={name!r} is no environment, as the module has no function {function!r}; add it.")
    return Environment(
        module=module_name,
        list_tasks=module.list_tasks,
        make_env=module.make_env,
        prepare=getattr(module, "prepare", lambda options: None),
        narrowed=getattr(module, "narrowed", lambda options, split, number: options),
        demonstrations=getattr(module, "demonstrations", functools.partial(_no_demonstrations, name)),
        rename=getattr(module, "rename", functools.partial(_no_renaming, name)),
        phrases=getattr(module, "PHRASES", ""),
        slots_per_worker=getattr(module, "SLOTS_PER_WORKER", None),
    )


def _no_demonstrations(name: str, tasks: list[Task], options: dict[str, Any]) -> list[Demonstration]:
    raise UserError(f"env.name={name!r} has no expert demonstrations; set config.warm_start.episodes=0.")


def _no_renaming(name: str, demonstrations: list[Demonstration], seed: int) -> list[Demonstration]:
    raise UserError(f"env.name={name!r} cannot rename its expert episodes; set config.warm_start.copies=0.")
