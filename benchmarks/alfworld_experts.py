"""Success of the searching expert on generated ALFWorld games, by task type.

    python benchmarks/alfworld_experts.py [games of each type and split]      40 of each by default: three minutes on one core

The expert sees the texts alone. Rooms are complete and games have the paper's 50 turns. There is no fallback on the walkthrough,
which is made from the hidden state and always wins.
"""

import json
import statistics
import sys

from epo_jax.envs.alfworld import engine, experts, games, rooms
from epo_jax.envs.alfworld.env import split_intro

TURNS = 50


def turns_needed(game: engine.Game, trajectory: dict) -> int | None:
    """Actions until the expert wins, or None if it does not within the limit."""
    params = trajectory["pddl_params"]
    target = params["parent_target"] or params["toggle_target"]
    goal = experts.Goal(trajectory["task_type"], params["object_target"].lower(), target.lower())
    moves = experts.expert_moves(goal, split_intro(game.intro)[0])
    state, action = game.start, next(moves, None)
    for turn in range(TURNS):
        if action is None:
            return None
        state, text = game.step(state, action)
        if state.won:
            return turn + 1
        try:
            action = moves.send(text)
        except StopIteration:
            return None
    return None


def main(count: int) -> None:
    print(f"{count} games of each type and split, at most {TURNS} turns\n")
    print("| task type | train: solved | median turns | unseen: solved | median turns |\n| --- | --- | --- | --- | --- |")
    for kind, task_type in enumerate(rooms.TASK_TYPES):
        cells = []
        for split in ("train", "valid_unseen"):
            needed = []
            for i in range(count):
                made = games.generate(split, kind + i * len(rooms.TASK_TYPES), 0, None)
                game = engine.read_game(made.files["game.tw-pddl"].encode())
                needed.append(turns_needed(game, json.loads(made.files["traj_data.json"])))
            solved = [n for n in needed if n is not None]
            cells += [f"{len(solved)}/{count}", f"{statistics.median(solved):g}" if solved else "-"]
        print(f"| {task_type} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
