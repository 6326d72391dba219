"""An environment for the rollout's tests: what is seen, how much of it, the reward and the end all depend on the actions so
far; answers may come late, by random delays."""

import hashlib
import random
import time

from epo_jax.envs.base import Observation

GOAL = "find the door."
WORDS = "red blue green door wall step left right far near".split()
LONGEST = 9
PHRASES = ""


class WanderEnv:
    def __init__(self, delay):
        self._delay, self._random = delay, random.Random()  # of the time alone, never of what is seen

    def reset(self, task):
        self._actions = [task["id"]]
        return self._seen()

    def step(self, action):
        self._actions.append(action)
        return self._seen()

    def _seen(self):
        time.sleep(self._delay * self._random.random())
        digest = hashlib.sha256("|".join(self._actions).encode()).digest()
        text = " ".join(WORDS[b % len(WORDS)] for b in digest[1 : 3 + digest[0] % 29])
        done = len(self._actions) > 1 and (digest[30] % 6 == 0 or len(self._actions) > LONGEST)
        won = done and digest[31] % 2 == 0
        return Observation(text=text, goal=GOAL, reward=10.0 * won, done=done, won=won)


def make_env(options):
    return WanderEnv(options.get("delay", 0.0))


def prepare(options):
    pass


def list_tasks(split, options):
    return [{"id": f"{split}-{i}", "type": "t"} for i in range(6)]
