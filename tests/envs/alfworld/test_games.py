"""Generated games: deterministic, split as promised, in the dataset's layout."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

from epo_jax.common.errors import UserError
from epo_jax.envs.alfworld import rooms
from epo_jax.envs.alfworld.games import Generated, generate

COUNT = 60


def digest(split="train", seed=3, max_receptacles=10, count=12) -> str:
    made = [generate(split, i, seed, max_receptacles) for i in range(count)]
    return hashlib.sha256(json.dumps([[g.folder, g.files, g.walkthrough] for g in made]).encode()).hexdigest()


@pytest.fixture(scope="module")
def games():
    splits = ("train", "valid_seen", "valid_unseen")
    return {split: [generate(split, i, 0, 10) for i in range(COUNT)] for split in splits}


def room_and_pairing(game: Generated) -> tuple[int, rooms.Pairing]:
    data = json.loads(game.files["traj_data.json"])
    params = data["pddl_params"]
    target = params["parent_target"] or params["toggle_target"]
    return data["scene"]["scene_num"], rooms.Pairing(params["object_target"], target)


def initial_facts(game: Generated, predicate: str) -> list[list[str]]:
    return [m.split() for m in re.findall(rf"^\({predicate} (.*)\)$", game.files["initial_state.pddl"], re.M)]


def test_the_same_options_give_the_same_bytes_in_another_process():
    program = "from test_games import digest; print(digest())"
    env = {
        **os.environ,
        "PYTHONHASHSEED": "12345",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
    }
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert run.stdout.strip() == digest(), run.stderr[-2000:]


def test_seed_split_and_size_each_make_other_games():
    assert (
        len(
            {
                digest(count=2),
                digest(count=2, seed=4),
                digest("valid_seen", count=2),
                digest(count=2, max_receptacles=9),
            }
        )
        == 4
    )


def test_unseen_rooms_and_pairings_are_never_trained_on(games):
    seen = [room_and_pairing(game) for split in ("train", "valid_seen") for game in games[split]]
    unseen = [room_and_pairing(game) for game in games["valid_unseen"]]
    assert {room for room, _ in unseen} == set(rooms.UNSEEN_ROOMS)
    assert not {room for room, _ in seen} & set(rooms.UNSEEN_ROOMS)
    assert not {pairing for _, pairing in seen} & {pairing for _, pairing in unseen}


@pytest.mark.parametrize("seed", range(5))
def test_every_task_type_has_held_out_and_other_pairings(seed):
    held_out = rooms.held_out_pairings(seed)
    for task_type in rooms.TASK_TYPES:
        for unseen in (True, False):
            numbers = rooms.rooms_of(task_type, unseen)
            pairings = {pairing for room in numbers for pairing in rooms.pairings(task_type, room)}
            assert len(pairings & held_out if unseen else pairings - held_out) >= rooms.HELD_OUT_MINIMUM
    assert held_out != rooms.held_out_pairings(seed + 1)


def test_task_types_alternate_and_the_folder_names_the_game(games):
    for index, game in enumerate(games["train"]):
        assert game.task_type == rooms.TASK_TYPES[index % 6]
        room, pairing = room_and_pairing(game)
        stem = re.escape(f"{game.task_type}-{pairing.object}-None-{pairing.target}-{room}")
        assert re.fullmatch(stem + r"/trial_T2019\d{4}_\d{6}_\d{6}", game.folder)
    assert len({game.folder for game in games["train"]}) == COUNT


@pytest.mark.parametrize("limit", [5, 10])
def test_a_compact_room_holds_no_more_than_asked_and_what_the_goal_needs(limit):
    for index in range(24):
        game = generate("train", index, 1, limit)
        receptacles = dict(initial_facts(game, "receptacleType"))
        assert len(receptacles) <= limit
        _, pairing = room_and_pairing(game)
        needed = {rooms.TREATMENTS.get(game.task_type, ("", "", ""))[2]} - {""}
        if pairing.target != rooms.LAMP:
            needed.add(pairing.target)
        assert {f"{type_}Type" for type_ in needed} <= set(receptacles.values())


def test_objects_lie_where_they_fit_and_the_goals_never_on_its_target(games):
    for game in games["train"]:
        _, pairing = room_and_pairing(game)
        types = dict(initial_facts(game, "objectType")) | dict(initial_facts(game, "receptacleType"))
        copies = 0
        for thing, place in initial_facts(game, "inReceptacle"):
            object_type, receptacle_type = types[thing].removesuffix("Type"), types[place].removesuffix("Type")
            if object_type != rooms.LAMP:
                assert rooms.fits(receptacle_type, object_type), (object_type, receptacle_type)
            if object_type == pairing.object:
                copies += 1
                assert receptacle_type != pairing.target
        assert copies >= (2 if game.task_type == "pick_two_obj_and_place" else 1)


def test_no_two_receptacles_share_a_place(games):
    for game in games["train"]:
        places = [place for _, place in initial_facts(game, "receptacleAtLocation")]
        assert len(set(places)) == len(places)


def test_a_room_too_small_for_any_game_is_refused():
    with pytest.raises(UserError, match="max_receptacles=1"):
        generate("train", 0, 0, 1)


def test_importing_the_package_leaves_the_environment_alone():
    program = "import os; from epo_jax.envs.alfworld import rooms; rooms.constants(); print(os.environ.get('ALFWORLD_DATA'))"
    for value in (None, "/nowhere"):
        env = {name: v for name, v in os.environ.items() if name != "ALFWORLD_DATA"}
        env |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({} if value is None else {"ALFWORLD_DATA": value})
        run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
        assert run.stdout.strip() == str(value), run.stderr
