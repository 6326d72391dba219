"""The environment protocol: what a text game must offer to be trained on.

An environment is a module, named in `ENVIRONMENTS`, with four functions:

    prepare(options)                -> None                 make or check everything on disk, once, in the main process
    list_tasks(split, options)      -> list[Task]           every task of a split, in a fixed order
    make_env(options)               -> TextEnv              called inside a worker process
    demonstrations(tasks, options)  -> list[Demonstration]  expert episodes for the warm start

and with `PHRASES`, a regular expression of the set phrases that a tokenizer trained on its texts keeps whole ("" = none).

`options` is a plain dict (the `env` section of the config). A `Task` is a JSON-able dict with at least `id` (unique) and
`type` (the row of the per-type table); the rest is the environment's own (a game file, a variation number).
"""

import dataclasses
import importlib
from typing import Any, Protocol

from epo_jax.errors import UserError

Task = dict[str, Any]

SPLITS = ("train", "valid_seen", "valid_unseen")

ENVIRONMENTS = {
    "alfworld": "epo_jax.envs.alfworld",
    "scienceworld": "epo_jax.envs.scienceworld",
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


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """An expert episode: `observations[i]` is what was seen before `actions[i]`; one more observation follows the last action."""

    task: Task
    goal: str
    observations: tuple[str, ...]
    actions: tuple[str, ...]
    won: bool


class TextEnv(Protocol):
    """One live episode at a time; deterministic given the task and the actions."""

    def reset(self, task: Task) -> Observation: ...

    def step(self, action: str) -> Observation: ...

    def close(self) -> None: ...


def environment(name: str):
    """The module that implements environment `name`. Raises UserError for a name that is not registered."""
    if name not in ENVIRONMENTS:
        raise UserError(f"env.name={name!r} is not an environment; choose one of {', '.join(sorted(ENVIRONMENTS))}.")
    return importlib.import_module(ENVIRONMENTS[name])
