"""Splits and gold episodes of the ScienceWorld simulator, which are computed once and cached.

Runs as a separate process, `python -m epo_jax.envs.scienceworld.gold`, because computing gold actions changes the simulator
permanently. Reads a JSON request from standard input and writes JSON lines:

    {"op": "splits", "simplification": ""}
        {"task": "boil", "train": [...], "dev": [...], "test": [...]}        for every task
    {"op": "gold", "simplification": "easy", "hints": "none", "jobs": [["boil", 0], ...]}
        {"task": "boil", "variation": 0, "observations": [{"text": "..."}, ...], "actions": [...]}
    bad input
        {"user_error": "..."}

The simulator's gold actions use the hidden state: they open open doors, and focus on an object in a room without looking
around. An expert episode leaves the former out, adds a "look around" (which takes no simulated time) before the latter, and
ends when the task is completed. If the changed actions do not solve the task, the episode has the original ones.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from epo_jax.common.errors import UserError
from epo_jax.envs.agent import parse_action
from epo_jax.envs.base import Observation, to_fields
from epo_jax.envs.scienceworld.jvm import Episode, Simulator
from epo_jax.envs.scienceworld.protocol import ScienceWorld

_NOTHING_DONE = "The door is already open."


def _splits(simulator: Simulator) -> Iterator[dict[str, Any]]:
    episode = Episode(simulator)
    for task in list(episode.server.getTaskNames()):
        episode.load(task, 0)
        server = episode.server
        yield {
            "task": task,
            "train": list(server.getVariationsTrain()),
            "dev": list(server.getVariationsDev()),
            "test": list(server.getVariationsTest()),
        }


def _tidied(episode: Episode, job: tuple[str, int], actions: list[str]) -> list[str]:
    """Returns `actions` with the changes that the module describes."""
    episode.load(*job)
    episode.step("look around")
    played, looked = [], True
    for gold in actions:
        for action in ["look around", gold] if not looked and gold.startswith("focus on") else [gold]:
            text, _, completed = episode.step(action)
            if text == _NOTHING_DONE:
                continue
            played.append(action)
            looked = action == "look around" or (looked and not action.startswith(("go ", "teleport ")))
        if completed:
            break
    return played


def _play(env: ScienceWorld, job: tuple[str, int], actions: list[str]) -> tuple[list[Observation], list[str]]:
    """Takes `actions` until the episode ends; returns (observations, actions)."""
    task, variation = job
    observations = [env.reset({"id": f"{task}/{variation}", "type": task, "variation": variation})]
    for action in actions:
        observations.append(env.step(action))
        if observations[-1].done:
            break
    return observations, actions[: len(observations) - 1]


def _gold(simulator: Simulator, jobs: list[tuple[str, int]], hints: str) -> Iterator[dict[str, Any]]:
    expert, helper, env = Episode(simulator), Episode(simulator), ScienceWorld(simulator, hints)
    for job in jobs:
        expert.load(*job, gold=True)
        # Normalized like an agent's actions (lower case).
        actions = [parse_action(action, tags=False).action for action in expert.server.getGoldActionSequence()]
        observations, played = _play(env, job, _tidied(helper, job, actions))
        if not observations[-1].won:
            observations, played = _play(env, job, actions)
        fields = [to_fields(observation) for observation in observations]
        yield {"task": job[0], "variation": job[1], "observations": fields, "actions": played}


def main() -> None:
    request = json.load(sys.stdin)
    try:
        simulator = Simulator(request["simplification"])
        answers = _splits(simulator) if request["op"] == "splits" else _gold(simulator, request["jobs"], request["hints"])
        for answer in answers:
            print(json.dumps(answer))
        simulator.close()
    except UserError as error:
        print(json.dumps({"user_error": str(error)}))


if __name__ == "__main__":
    main()
