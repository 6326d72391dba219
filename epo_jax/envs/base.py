"""The environment protocol: what a text game must offer to be trained on.

An environment is a module with

    list_tasks(split, options)      -> list[Task]           every task of a split, in a fixed order
    make_env(options)               -> TextEnv              called inside a worker process

and, where it has use for them,

    prepare(options)                -> None                 make or check everything on disk, once, in the main process
    demonstrations(tasks, options)  -> list[Demonstration]  expert episodes for the warm start
    rename(demonstrations, seed)    -> list[Demonstration]  each with other names in it (config.warm_start.copies)
    PHRASES = "regular expression"                          set phrases that a tokenizer trained on its texts keeps whole
    SLOTS_PER_WORKER = 32                                   most episodes that one worker process can hold

`config.env.name` is its name in `ENVIRONMENTS` or, for a module from elsewhere, the name by which it is imported.
docs/environments.md builds one.

`options` is a plain dict (the `env` section of the config). A `Task` is a JSON-able dict with at least `id` (unique) and
`type` (the row of the per-type table); the rest is the environment's own: a game file, a variation, a seed.
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
    """What the agent sees after a reset or a step.

    Attributes:
        text: the observation, without the goal where the environment can tell them apart.
        goal: the task in words; the same at every turn of an episode.
        reward: reward of the step just taken (0 after a reset).
        done: the episode has ended inside the environment (turn limits are the caller's).
        won: the task was completed.
        score: task progress in [0, 100].
        admissible: the actions that would be accepted now, where the environment's options ask for them, else empty.
        objects: the things that actions can name now, likewise.
        commands: after a reset, the forms that actions take, where there is no list of admissible ones.
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


_BLANK = vars(Observation(text=""))


def to_fields(observation: Observation) -> dict[str, Any]:
    """What JSON keeps of an observation: its text, and every other field that says something."""
    return {name: value for name, value in vars(observation).items() if name == "text" or value != _BLANK[name]}


def from_fields(fields: dict[str, Any]) -> Observation:
    """The observation that was written as `fields`. Raises TypeError for fields that it does not have."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Observation(**values)


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """An expert episode, with all that an agent would be told in it.

    Attributes:
        observations: `observations[i]` is what was seen before `actions[i]`; one more follows the last action.
        mistakes: the turns whose actions are not for imitation: made on purpose, to show what is done after them.
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
    """One live episode at a time; deterministic given the task and the actions, so that a lost one can be played again."""

    def reset(self, task: Task) -> Observation: ...

    def step(self, action: str) -> Observation: ...


@dataclasses.dataclass(frozen=True)
class Environment:
    """An environment module, with what it leaves out filled in. `module` is the name that worker processes import."""

    module: str
    list_tasks: Callable[[str, dict[str, Any]], list[Task]]
    make_env: Callable[[dict[str, Any]], TextEnv]
    prepare: Callable[[dict[str, Any]], None]
    demonstrations: Callable[[list[Task], dict[str, Any]], list[Demonstration]]
    rename: Callable[[list[Demonstration], int], list[Demonstration]]
    phrases: str
    slots_per_worker: int | None


def environment(name: str) -> Environment:
    """The environment called `name`. Raises UserError if there is none, or if it lacks what every environment has."""
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
            raise  # it is there, and something that it imports is not
        raise unknown from None
    for function in ("list_tasks", "make_env"):
        if not callable(getattr(module, function, None)):
            raise UserError(f"env.name={name!r} is no environment, as the module has no function {function!r}; add it.")
    return Environment(
        module=module_name,
        list_tasks=module.list_tasks,
        make_env=module.make_env,
        prepare=getattr(module, "prepare", lambda options: None),
        demonstrations=getattr(module, "demonstrations", functools.partial(_no_demonstrations, name)),
        rename=getattr(module, "rename", functools.partial(_no_renaming, name)),
        phrases=getattr(module, "PHRASES", ""),
        slots_per_worker=getattr(module, "SLOTS_PER_WORKER", None),
    )


def _no_demonstrations(name: str, tasks: list[Task], options: dict[str, Any]) -> list[Demonstration]:
    raise UserError(f"env.name={name!r} has no expert demonstrations; set config.warm_start.episodes=0.")


def _no_renaming(name: str, demonstrations: list[Demonstration], seed: int) -> list[Demonstration]:
    raise UserError(f"env.name={name!r} cannot rename its expert episodes; set config.warm_start.copies=0.")
