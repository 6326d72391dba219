"""ALFWorld as an environment: folders, tasks, episodes, demonstrations."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from epo_jax.common import stopping
from epo_jax.common.errors import UserError
from epo_jax.envs.alfworld import experts, jobs
from epo_jax.envs.alfworld import protocol as alfworld
from epo_jax.envs.alfworld.rooms import TASK_TYPES
from epo_jax.envs.base import SPLITS
from epo_jax.envs.workers.pool import EnvPool

GAMES = 12
HOSTILE = (
    "",
    " \n",
    "\x00\x1b[2J",
    "{0} {r.name} %s \\ \" '",
    "🐍 кошка 看",
    "\ud800",
    "<action>look</action>",
    "</think><action>loo",
    "look\nlook",
    "ignore the rules and win",
    "__import__('os')._exit(1)",
    "#intro#",
    "restart",
    "go to",
    "a" * 100_000,
    "open " * 20_000,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    folder.chmod(0o755)  # a cache that others may read
    return folder


@pytest.fixture(scope="module")
def generated(data_dir):
    """Options with their games made; no test writes to them."""
    made = {
        "name": "alfworld",
        "data_dir": str(data_dir),
        "max_receptacles": 10,
        "seed": 5,
        "workers": 2,
        "max_turns": 25,
    }
    made |= {f"{split}_games": GAMES for split in SPLITS}
    outer = os.environ.pop("ALFWORLD_DATA", None)
    alfworld.prepare(made)
    if outer is not None:
        os.environ["ALFWORLD_DATA"] = outer
    return made


@pytest.fixture
def options(generated, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    return dict(generated)


@pytest.fixture
def real(options, tmp_path, monkeypatch):
    """A folder like the real dataset, in ALFWORLD_DATA: two training games and four that are not to be played."""
    tasks = alfworld.list_tasks("train", options)[:6]
    folders = [tmp_path / "alfworld" / "json_2.1.1" / Path(task["id"]) for task in tasks]
    for task, folder in zip(tasks, folders, strict=True):
        shutil.copytree(Path(task["file"]).parent, folder)
    sliced = folders[2].parent.with_name(folders[2].parent.name.replace("-None-", "Sliced-None-"))
    folders[2].parent.rename(sliced)
    other = "pick_and_place_with_movable_recep-Spoon-Mug-DiningTable-7"
    folders[3].parent.rename(folders[3].parent.with_name(other))
    unsolvable = folders[4] / "game.tw-pddl"
    unsolvable.write_text(unsolvable.read_text().replace('"solvable": true', '"solvable": false'))
    (folders[5] / "game.tw-pddl").unlink()
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "alfworld"))
    options["data_dir"] = str(tmp_path / "cache")
    return options, [task["id"] for task in tasks[:2]]


def test_every_generated_game_is_won_by_its_walkthrough(options):
    for split in SPLITS:
        tasks = alfworld.list_tasks(split, options)
        assert [task["type"] for task in tasks] == [TASK_TYPES[i % 6] for i in range(GAMES)]
        assert len({task["id"] for task in tasks}) == GAMES
        env = alfworld.make_env(options)
        for task in tasks:
            observation = env.reset(task)
            for command in json.loads(Path(task["file"]).read_text())["walkthrough"]:
                assert not observation.done
                observation = env.step(command)
            assert observation.won and observation.done and observation.score == 100.0


def test_preparing_again_changes_nothing(options, data_dir):
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    alfworld.prepare(options)
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before
    assert not list(data_dir.rglob(".partial*"))


def test_whoever_may_read_the_cache_may_read_all_of_it(options, data_dir):
    """Folders and files of the tempfile module are for their owner only."""
    alfworld.list_tasks("train", options)
    closed = [path for path in data_dir.rglob("*") if path.stat().st_mode & 0o044 != 0o044]
    assert closed == []


def test_the_number_of_workers_does_not_change_the_games(options, tmp_path):
    small = {**options, "train_games": 3, "valid_seen_games": 1, "valid_unseen_games": 0}
    contents = []
    for workers in (1, 2):
        tasks = alfworld.list_tasks("train", {**small, "workers": workers, "data_dir": str(tmp_path / str(workers))})
        contents.append([(task["id"], Path(task["file"]).read_bytes()) for task in tasks])
    assert contents[0] == contents[1]


def test_one_game_is_made_alone_and_is_the_one_of_all(options, tmp_path):
    wanted = {**options, "data_dir": str(tmp_path), "train_games": 10**6, "valid_seen_games": 10**6}
    few = alfworld.narrowed(wanted, "valid_unseen", 1)
    assert [few[f"{split}_games"] for split in SPLITS] == [2 if split == "valid_unseen" else 0 for split in SPLITS]
    alfworld.prepare(few)
    alone, whole = (alfworld.list_tasks("valid_unseen", used)[1] for used in (few, options))
    assert alone["id"] == whole["id"] and Path(alone["file"]).read_bytes() == Path(whole["file"]).read_bytes()
    assert alfworld.narrowed(options, "valid_unseen", 1) == options, "games that are there are used"
    past = wanted["valid_unseen_games"]
    assert alfworld.narrowed(wanted, "valid_unseen", past) == wanted, "there is no such game, which the whole list shows"


def test_the_training_process_imports_no_engine(options):
    program = (
        "import json, sys; from epo_jax.envs.alfworld import protocol as alfworld; options = json.loads(sys.argv[1]); "
        "alfworld.prepare(options); alfworld.demonstrations(alfworld.list_tasks('train', options)[:1], options); "
        "print(sorted(set(sys.modules) & {'jax', 'numpy', 'textworld', 'alfworld', 'fast_downward', 'jericho'}))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program, json.dumps(options)], env=env, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "[]", run.stderr


def test_the_first_observation_has_no_banner_and_no_goal(options):
    env = alfworld.make_env(options)
    for task in alfworld.list_tasks("valid_seen", options):
        first = env.reset(task)
        assert first.text.startswith("You are in the middle of a room. Looking quickly around you, you see a ")
        assert first.text.endswith(".") and "\n" not in first.text and "task" not in first.text
        assert first.goal and not first.goal.endswith(".") and "task" not in first.goal
        assert (first.reward, first.done, first.won, first.score) == (0.0, False, False, 0.0)
        assert env.step("look").goal == first.goal


def test_the_reward_comes_once_with_the_winning_step(options):
    task = alfworld.list_tasks("train", options)[0]
    env = alfworld.make_env(options)
    env.reset(task)
    commands = json.loads(Path(task["file"]).read_text())["walkthrough"]
    rewards = [env.step(command).reward for command in [*commands, "look", "inventory"]]
    assert rewards == [0.0] * (len(commands) - 1) + [10.0, 0.0, 0.0]
    assert env.reset(task).won is False


def test_case_and_blanks_of_an_action_do_not_matter(options):
    task = alfworld.list_tasks("train", options)[0]
    command = json.loads(Path(task["file"]).read_text())["walkthrough"][0]
    env = alfworld.make_env(options)
    env.reset(task)
    expected = env.step(command)
    env.reset(task)
    assert env.step(f"  {command.upper()}\n") == expected
    assert expected.text.startswith("You arrive at")


def test_admissible_actions_are_given_when_asked_for(options):
    task = alfworld.list_tasks("train", options)[0]
    assert alfworld.make_env(options).reset(task).admissible == ()
    admissible = alfworld.make_env({**options, "hints": "admissible"}).reset(task).admissible
    assert "inventory" in admissible and "help" not in admissible
    assert json.loads(Path(task["file"]).read_text())["walkthrough"][0] in admissible


def test_hostile_actions_change_nothing(options):
    """Through a worker, which none of them ends: what a policy or a stranger may say, and what is said in other games."""
    task, other = alfworld.list_tasks("train", options)[:2]
    hinted = {**options, "hints": "admissible"}
    strange = set(alfworld.make_env(hinted).reset(other).admissible)
    with EnvPool("alfworld", hinted, workers=1) as pool:
        pool.reset(0, task)
        _, first = pool.get(60)
        for action in (*HOSTILE, *sorted(strange - set(first.admissible))):
            pool.step(0, action)
            _, observation = pool.get(60)
            assert observation == dataclasses.replace(first, text="Nothing happens."), action
        assert pool.restarts == 0


def test_a_missing_package_is_named(options, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "alfworld" else find_spec(name))
    with pytest.raises(UserError, match="the Python package alfworld is missing"):
        alfworld.prepare(options)


def test_hints_that_it_does_not_have_are_refused(options):
    with pytest.raises(UserError, match="env.hints='objects' is not known; choose one of none, admissible"):
        alfworld.prepare({**options, "hints": "objects"})


def test_a_missing_game_is_named(options, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path / "game.tw-pddl")):
        alfworld.make_env(options).reset({"id": "x", "type": "x", "file": str(tmp_path / "game.tw-pddl")})


def test_a_split_that_does_not_exist_is_refused(options):
    with pytest.raises(UserError, match="'test'.*valid_unseen"):
        alfworld.list_tasks("test", options)


def test_a_damaged_index_is_named(options, tmp_path):
    small = {**options, "data_dir": str(tmp_path), "train_games": 1, "valid_seen_games": 0, "valid_unseen_games": 0}
    alfworld.prepare(small)
    (index,) = tmp_path.rglob("index.json")
    index.write_text("{")
    with pytest.raises(UserError, match=str(index)):
        alfworld.list_tasks("train", small)


@pytest.mark.parametrize("broken", [{"max_receptacles": 1}, {"data_dir": "FILE"}])
def test_a_failed_generation_leaves_nothing_behind(options, tmp_path, broken):
    (tmp_path / "file").write_text("")
    options |= {"data_dir": str(tmp_path / "cache"), "train_games": 40}
    options |= {k: str(tmp_path / "file") if v == "FILE" else v for k, v in broken.items()}
    with pytest.raises(UserError):
        alfworld.prepare(options)
    assert not list(tmp_path.rglob("generated-*")) and not list(tmp_path.rglob(".partial*"))


# ---------------------------------------------------------------------------------------------- real data


def test_real_data_is_indexed_as_the_packages_loader_does(real):
    options, ids = real
    tasks = alfworld.list_tasks("train", options)
    assert sorted(task["id"] for task in tasks) == sorted(ids)
    assert alfworld.list_tasks("valid_unseen", options) == []
    for task in tasks:
        assert task["id"].split("/")[1].startswith(task["type"])
        assert alfworld.make_env(options).reset(task).text
    assert {d.won for d in alfworld.demonstrations(tasks, options)} == {True}


def test_the_index_of_real_data_is_made_once(real, monkeypatch):
    options, _ = real
    first = alfworld.list_tasks("train", options)
    monkeypatch.setattr(alfworld, "_index_real_data", lambda _: pytest.fail("indexed twice"))
    assert alfworld.list_tasks("train", options) == first


@pytest.mark.parametrize("change", ["deleted", "repaired", "added"])
def test_a_change_in_real_data_is_noticed(real, change):
    options, ids = real
    first = alfworld.list_tasks("train", options)
    data = Path(first[0]["file"]).parents[3]
    broken = next(path for path in data.rglob("game.tw-pddl") if '"solvable": false' in path.read_text())
    if change == "deleted":
        Path(first[0]["file"]).unlink()
    elif change == "repaired":
        broken.write_text(broken.read_text().replace('"solvable": false', '"solvable": true'))
    else:
        shutil.copytree(Path(first[0]["file"]).parent, Path(first[0]["file"]).parents[1] / "trial_T20190909_000000_000000")
    now = [task["id"] for task in alfworld.list_tasks("train", options)]
    assert len(now) == len(ids) + (-1 if change == "deleted" else 1)
    assert all(d.won for d in alfworld.demonstrations(alfworld.list_tasks("train", options), options))


def test_games_that_are_finished_are_kept_when_their_making_is_interrupted(tmp_path, options, monkeypatch):
    """And the whole is what it would have been."""
    options = options | {f"{split}_games": 2 for split in SPLITS} | {"data_dir": str(tmp_path), "workers": 1}
    run_jobs, made = jobs.run_jobs, []

    def interrupted(jobs, progress):
        def report(done):
            if done == 3:
                raise KeyboardInterrupt
            progress(done)

        return run_jobs(jobs, report)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(alfworld, "run_jobs", interrupted)
        alfworld.prepare(options)
    assert not stopping.process_groups
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("game.tw-pddl")}
    assert 3 <= len(before) <= 6
    alfworld.prepare(options)
    folder = next((tmp_path / "alfworld").glob("generated-*"))
    made = sorted(folder.rglob("game.tw-pddl"))
    assert len(made) == 6 and set(before.values()) <= {path.stat().st_mtime_ns for path in made}
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("content", [None, [], ["json_2.1.1"], ["json_2.1.1/train", "json_2.1.1/valid_seen"]])
def test_real_data_without_games_is_refused(options, tmp_path, monkeypatch, content):
    folder = tmp_path / "data"
    for name in content or []:
        (folder / name).mkdir(parents=True)
    if content is not None:
        folder.mkdir(exist_ok=True)
    monkeypatch.setenv("ALFWORLD_DATA", str(folder))
    options["data_dir"] = str(tmp_path / "cache")
    with pytest.raises(UserError, match=str(folder)):
        alfworld.list_tasks("train", options)


# ---------------------------------------------------------------------------------------------- demonstrations


def test_demonstrations_win_and_play_back_exactly(options):
    env = alfworld.make_env(options)
    for split in SPLITS:
        tasks = alfworld.list_tasks(split, options)
        shown = alfworld.demonstrations(tasks, options)
        assert [d.task for d in shown] == tasks
        for demonstration in shown:
            first = env.reset(demonstration.task)
            assert demonstration.observations == (first, *(env.step(action) for action in demonstration.actions))
            assert demonstration.won and len(demonstration.actions) <= options["max_turns"]


def test_demonstrations_tell_what_an_agent_is_told(options):
    task = alfworld.list_tasks("train", options)[0]
    hinted = {**options, "hints": "admissible"}
    shown, bare = (alfworld.demonstrations([task], each)[0] for each in (hinted, options))
    env = alfworld.make_env(hinted)
    assert shown.observations == (env.reset(task), *(env.step(action) for action in shown.actions))
    assert all(action in seen.admissible for seen, action in zip(shown.observations, shown.actions, strict=False))
    assert shown.actions == bare.actions and not any(seen.admissible for seen in bare.observations)


def test_the_expert_makes_no_idle_move(options):
    for split in SPLITS:
        for demonstration in alfworld.demonstrations(alfworld.list_tasks(split, options), options):
            assert not any("Nothing happens" in seen.text for seen in demonstration.observations)
            assert {action.split()[0] for action in demonstration.actions} <= {
                "go", "open", "take", "move", "use", "heat", "cool", "clean",
            }  # fmt: skip
            searched = []
            for action, before in zip(demonstration.actions, (None, *demonstration.actions), strict=False):
                assert action != before
                if action.startswith("open"):
                    assert action not in searched
                    searched.append(action)


def test_demonstrations_are_kept(options, monkeypatch):
    tasks = alfworld.list_tasks("train", options)[:3]
    first = alfworld.demonstrations(tasks, options)
    monkeypatch.setattr(alfworld, "run_jobs", lambda *_: pytest.fail("played again"))
    assert alfworld.demonstrations(tasks, options) == first
    assert alfworld.demonstrations([], options) == []


def test_a_hesitating_expert_wastes_turns_in_some_of_its_episodes(options):
    task = alfworld.list_tasks("train", options)[0]
    shown = alfworld.demonstrations([task] * 8, {**options, "hesitation": 0.5})
    moves = [[a for a in d.actions if a != "inventory"] for d in shown]
    assert all(d.won for d in shown) and moves == [moves[0]] * 8
    assert {len(d.actions) for d in shown} == {len(moves[0]), 2 * len(moves[0])}


def test_mistakes_change_nothing_in_the_game_and_are_marked(options):
    tasks = alfworld.list_tasks("train", options)[:4]
    plain = alfworld.demonstrations(tasks, options)
    made = 0
    for sound, shown in zip(plain, alfworld.demonstrations(tasks, {**options, "mistakes": 0.5}), strict=True):
        assert shown.won
        assert all(shown.observations[turn + 1].text.strip() == "Nothing happens." for turn in shown.mistakes)
        assert [a for turn, a in enumerate(shown.actions) if turn not in shown.mistakes] == list(sound.actions)
        made += len(shown.mistakes)
    assert made > 4


def test_where_the_expert_fails_the_walkthrough_is_shown(options, monkeypatch):
    tasks = alfworld.list_tasks("train", options)[:2]
    job = {"tasks": [{**task, "seed": ""} for task in tasks], "max_turns": 25, "hesitation": 0.0, "mistakes": 0.0}
    job |= {"admissible": False}
    monkeypatch.setattr(experts, "expert_moves", lambda goal, text: iter(()))
    for task, episode in zip(tasks, jobs.demonstrate(job), strict=True):
        assert episode["won"] and episode["actions"] == json.loads(Path(task["file"]).read_text())["walkthrough"]
    short = next(iter(jobs.demonstrate({**job, "max_turns": 1})))
    assert not short["won"] and len(short["observations"]) == len(short["actions"]) + 1


def test_a_missing_description_of_the_task_is_named(real):
    options, _ = real
    tasks = alfworld.list_tasks("train", options)
    description = Path(tasks[0]["file"]).with_name("traj_data.json")
    description.unlink()
    with pytest.raises(UserError, match=str(description)):
        alfworld.demonstrations(tasks, options)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(24, "Too many open files"), r"Too many open files\); raise the limit on open files"),
        (ValueError("Expecting value"), r"Expecting value\); move .* away and it is made again"),
    ],
)
def test_an_index_that_cannot_be_read_names_why(tmp_path, monkeypatch, error, told):
    def failing(*_, **__):
        raise error

    (tmp_path / "index.json").write_text("{}")
    monkeypatch.setattr(alfworld, "_index_path", lambda options: tmp_path / "index.json")
    monkeypatch.setattr(Path, "read_text", failing)
    with pytest.raises(UserError, match=f"index.json cannot be read .*{told}") as refusal:
        alfworld.list_tasks("train", {})
    assert "delete" not in str(refusal.value)


def test_damaged_expert_episodes_name_their_file(tmp_path, monkeypatch):
    options = {"hints": "none", "max_turns": 3}
    monkeypatch.setattr(alfworld, "_cache", lambda options: tmp_path)
    monkeypatch.setattr(alfworld, "_digest", lambda key: "kept")
    (tmp_path / "demonstrations").mkdir()
    (tmp_path / "demonstrations" / "kept.jsonl").write_text('{"obs')
    with pytest.raises(UserError, match=r"kept.jsonl cannot be read \(.*\); move it away and the expert plays again"):
        alfworld.demonstrations([{"id": "a", "type": "t", "file": "f"}], options)
