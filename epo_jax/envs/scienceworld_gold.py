"""What is asked of the ScienceWorld simulator once and kept: the split of each task's variations, and gold episodes.

Runs as a process of its own, `python -m epo_jax.envs.scienceworld_gold`, because working out gold actions changes the
simulator for good. Reads one JSON request from standard input and answers in JSON lines:

    {"op": "splits", "simplification": ""}
        {"task": "boil", "train": [...], "dev": [...], "test": [...]}        for every task
    {"op": "gold", "simplification": "easy", "jobs": [["boil", 0], ...]}
        {"task": "boil", "variation": 0, "goal": "...", "observations": [...], "actions": [...], "won": true}
    a request that cannot be met
        {"user_error": "..."}

The simulator's gold actions know what no player can see: they open doors that stand open, and go straight for an object
in a room they never looked at. A demonstration drops the first, adds a "look around" (which takes no simulated time)
before the second, and ends where the task is completed. One that no longer solves the task then is kept as it was.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from epo_jax.envs.scienceworld_jvm import Episode, Simulator
from epo_jax.errors import UserError

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


def _play(episode: Episode, job: tuple[str, int], actions: list[str], tidy: bool) -> dict[str, Any]:
    """Plays `actions` until the task is completed; with `tidy`, as the module says, but for the time idle ones took."""
    episode.load(*job)
    observations, played, looked = [episode.step("look around").text], [], True
    completed, score = False, 0
    for wanted in actions:
        for action in ["look around", wanted] if tidy and not looked and wanted.startswith("focus on") else [wanted]:
            text, score, completed = episode.step(action)
            if tidy and text == _NOTHING_DONE:
                continue
            played.append(action)
            observations.append(text)
            looked = action == "look around" or (looked and not action.startswith(("go ", "teleport ")))
        if completed:
            break
    won = completed and score == 100
    return {"goal": episode.server.getTaskDescription(), "observations": observations, "actions": played, "won": won}


def _gold(simulator: Simulator, jobs: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    expert, player = Episode(simulator), Episode(simulator)
    for task, variation in jobs:
        expert.load(task, variation, gold=True)
        actions = list(expert.server.getGoldActionSequence())
        demo = _play(player, (task, variation), actions, tidy=True)
        if demo["won"]:  # once more without the idle actions, whose time is now missing
            demo = _play(player, (task, variation), demo["actions"], tidy=False)
        if not demo["won"]:
            demo = _play(player, (task, variation), actions, tidy=False)
        yield {"task": task, "variation": variation, **demo}


def main() -> None:
    request = json.load(sys.stdin)
    try:
        simulator = Simulator(request["simplification"])
        answers = _splits(simulator) if request["op"] == "splits" else _gold(simulator, request["jobs"])
        for answer in answers:
            print(json.dumps(answer))
        simulator.close()
    except UserError as error:
        print(json.dumps({"user_error": str(error)}))


if __name__ == "__main__":
    main()
