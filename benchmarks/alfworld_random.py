"""ALFWorld with random actions in place of the policy's, so that all sides of a benchmark play the same episodes."""

import dataclasses
import random

from epo_jax.envs.alfworld import protocol as alfworld

prepare, list_tasks = alfworld.prepare, alfworld.list_tasks


class RandomAlfworld:
    """The real engine; action t of an episode is drawn from the admissible ones, which are not shown, by the task's id."""

    def __init__(self, options):
        self._env = alfworld.make_env({**options, "hints": "admissible"})

    def reset(self, task):
        self._random = random.Random(task["id"])
        return self._seen(self._env.reset(task))

    def step(self, action):
        return self._seen(self._env.step(self._random.choice(self._admissible)))

    def _seen(self, observation):
        self._admissible = observation.admissible
        return dataclasses.replace(observation, admissible=())


def make_env(options):
    return RandomAlfworld(options)
