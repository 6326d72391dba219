"""Renamed expert episodes: other names, the same moves."""

import re

from epo_jax.envs.alfworld.rename import rename
from epo_jax.envs.base import Demonstration, Observation

SEEN = (
    "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a microwave 1, and a shelf 2.",
    "You arrive at cabinet 1. On the cabinet 1, you see a apple 2, and a mug 1.",
    "You pick up the apple 2 from the cabinet 1.",
    "You arrive at microwave 1. The microwave 1 is closed.",
    "You heat the apple 2 using the microwave 1.",
    "You arrive at shelf 2. On the shelf 2, you see a apple 1.",
    "You move the apple 2 to the shelf 2.",
)
ACTIONS = (
    "go to cabinet 1",
    "take apple 2 from cabinet 1",
    "go to microwave 1",
    "heat apple 2 with microwave 1",
    "go to shelf 2",
    "move apple 2 to shelf 2",
)
GOAL = "put a hot apple in shelf"
EPISODE = Demonstration(
    task={"id": "t", "type": "pick_heat_then_place_in_recep"},
    observations=tuple(
        Observation(text, GOAL, won=i == len(ACTIONS), admissible=tuple(sorted({"go to shelf 2", "look", *ACTIONS[i : i + 1]})))
        for i, text in enumerate(SEEN)
    ),
    actions=ACTIONS,
)


def pattern_of(demonstration):
    """The episode with every name replaced by the order of its first appearance; equal for episodes alike but for names."""
    text = "\n".join((*(seen.text for seen in demonstration.observations), *demonstration.actions))
    seen = {}
    return re.sub(r"\b[a-z]+ \d+\b", lambda m: f"<{seen.setdefault(m[0], len(seen))}>", text)


def test_each_copy_has_names_of_its_own_and_the_seed_decides_them():
    copies = rename([EPISODE] * 8, seed=0)
    assert len({copy.observations for copy in copies}) > 4
    assert rename([EPISODE] * 8, seed=0) == copies != rename([EPISODE] * 8, seed=1)


def test_a_copy_is_the_same_episode_under_other_names():
    for copy in rename([EPISODE] * 20, seed=1):
        assert pattern_of(copy) == pattern_of(EPISODE)
        assert copy.task == EPISODE.task and copy.won


def test_places_stay_places_and_appliances_keep_their_names():
    copies = rename([EPISODE] * 30, seed=2)
    taken = {copy.actions[1].split()[1] for copy in copies}
    assert taken == {"apple", "mug"}
    for copy in copies:
        assert copy.actions[2] == "go to microwave 1" and " with microwave 1" in copy.actions[3]
        assert copy.actions[0].split()[2] in ("cabinet", "shelf")


def test_the_task_names_what_is_taken_and_where_it_goes():
    for copy in rename([EPISODE] * 20, seed=3):
        taken, target = copy.actions[1].split()[1], copy.actions[4].split()[2]
        assert copy.goal == f"put a hot {taken} in {target}"


def test_commands_are_renamed_and_stay_in_order():
    for copy in rename([EPISODE] * 20, seed=4):
        assert [len(seen.admissible) for seen in copy.observations] == [3, 3, 3, 3, 2, 3, 2]
        for seen, action in zip(copy.observations, copy.actions, strict=False):
            assert {action, "look"} <= set(seen.admissible) and list(seen.admissible) == sorted(seen.admissible)
