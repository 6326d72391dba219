"""A two-turn text game without dependencies: name the color of a door, then the number on it.

The observation contains each answer, so the best policy wins every episode (return 10); a policy that answers uniformly over
colors and digits wins one in 30. A learner reaches this known optimum in seconds.
"""

from typing import Any

from epo_jax.envs import base
from epo_jax.envs.base import Demonstration, Observation, Task

COLOURS = ("red", "blue", "green")
DIGITS = tuple("0123456789")
GOAL = "say the colour of the door, then its number."
WIN_REWARD = 10.0


def list_tasks(split: str, options: dict[str, Any]) -> list[Task]:
    """Returns all 30 doors for `train`, and those with even and odd numbers for the two validation splits."""
    tasks = [
        {"id": f"{colour}-{digit}", "type": colour, "colour": colour, "digit": digit} for digit in DIGITS for colour in COLOURS
    ]
    if split not in base.SPLITS:
        raise ValueError(f"unknown split {split!r}")
    if split == "train":
        return tasks
    parity = 0 if split == "valid_seen" else 1
    return [task for task in tasks if int(task["digit"]) % 2 == parity]


class ToyEnv:
    """The game. The reward is 10 after the second answer if both answers are right, else 0."""

    def reset(self, task: Task) -> Observation:
        self._answers = (task["colour"], task["digit"])
        self._turn = 0
        self._right = 0
        return Observation(text=f"you see a {task['colour']} door.", goal=GOAL, admissible=COLOURS)

    def step(self, action: str) -> Observation:
        if self._turn < 2:
            self._right += action.strip().lower() == self._answers[self._turn]
            self._turn += 1
        done, won = self._turn == 2, self._right == 2
        text = "the game is over." if done else f"the number is {self._answers[1]}."
        return Observation(
            text=text,
            goal=GOAL,
            reward=WIN_REWARD * won,
            done=done,
            won=won,
            score=50.0 * self._right,
            admissible=() if done else DIGITS,
        )


def make_env(options: dict[str, Any]) -> ToyEnv:
    return ToyEnv()


def demonstrations(tasks: list[Task], options: dict[str, Any]) -> list[Demonstration]:
    """Plays the right answers."""
    demos = []
    for task in tasks:
        env = ToyEnv()
        actions = (task["colour"], task["digit"])
        seen = [env.reset(task), *(env.step(action) for action in actions)]
        demos.append(Demonstration(task, tuple(seen), actions))
    return demos
