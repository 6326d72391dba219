"""ALFWorld played at random whatever the policy says, so that every contender of a benchmark plays the same episodes."""

import random

from epo_jax.envs import alfworld

PHRASES, prepare, list_tasks = alfworld.PHRASES, alfworld.prepare, alfworld.list_tasks


class RandomAlfworld:
    """The real engine; action t of an episode is drawn from the admissible ones by the task's id."""

    def __init__(self, options):
        self._env = alfworld.make_env({**options, "admissible": True})

    def reset(self, task):
        self._random = random.Random(task["id"])
        return self._seen(self._env.reset(task))

    def step(self, action):
        return self._seen(self._env.step(self._random.choice(self._admissible)))

    def _seen(self, observation):
        self._admissible = observation.admissible
        return observation


def make_env(options):
    return RandomAlfworld(options)
