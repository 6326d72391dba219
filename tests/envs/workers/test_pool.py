"""The pool: episodes survive whatever happens to their worker, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from epo_jax.common.errors import UserError
from epo_jax.envs import base, toy
from epo_jax.envs.workers import pool
from epo_jax.envs.workers.pool import Deadlines, EnvPool
from tests.envs.workers import faulty_env

ROOT = Path(__file__).parents[3]


@pytest.fixture
def faulty(monkeypatch, tmp_path):
    """Builds pools on the misbehaving environment; checks at the end that their processes are gone."""
    monkeypatch.setitem(base.ENVIRONMENTS, "faulty", "tests.envs.workers.faulty_env")
    pools = []

    def build(workers=1, memory_limit_mb=1000, **deadlines):
        limits = Deadlines(**{"start": 30.0, "reset": 20.0, "step": 20.0, **deadlines})
        pools.append(EnvPool("faulty", {"marker": str(tmp_path / "marker")}, workers, limits, memory_limit_mb))
        return pools[-1]

    yield build
    for each in pools:
        processes = worker_pids(each)
        each.close()
        assert not any(alive(pid) for pid in processes)


def worker_pids(env_pool):
    return [worker.process.pid for worker in env_pool._workers]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def play(env_pool, scripts):
    """Plays every script {slot: (task id, actions)} at the same time; the texts seen by each slot."""
    seen = {slot: [] for slot in scripts}
    for slot, (task_id, _) in scripts.items():
        env_pool.reset(slot, {"id": task_id, "type": "x"})
    left = sum(len(actions) + 1 for _, actions in scripts.values())
    for _ in range(left):
        slot, observation = env_pool.get(60)
        seen[slot].append(observation.text)
        actions = scripts[slot][1]
        if len(seen[slot]) <= len(actions):
            env_pool.step(slot, actions[len(seen[slot]) - 1])
    return seen


def test_many_slots_win_the_toy_game():
    tasks = toy.list_tasks("train", {})
    with EnvPool("toy", {}, workers=2) as env_pool:
        won, actions = set(), {}
        for slot, task in enumerate(tasks):
            env_pool.reset(slot, task)
            actions[slot] = [task["digit"], task["colour"]]
        while len(won) < len(tasks):
            slot, observation = env_pool.get(60)
            if observation.done:
                assert observation.won and observation.reward == 10.0
                won.add(slot)
            else:
                env_pool.step(slot, actions[slot].pop())
        assert len(worker_pids(env_pool)) == 2
        assert env_pool.restarts == 0


LIMITS = {"hang": {"step": 1.0}, "stop": {"silence": 1.0}, "exhaust": {"memory_limit_mb": 300}}


@pytest.mark.parametrize("fault", ["die", "rubbish", "malformed", "exception", "leave", "hang", "stop", "exhaust"])
def test_a_fault_in_one_episode_changes_no_observation(faulty, fault):
    scripts = {
        0: ("a", ["one", "two", fault, "three", "end"]),
        1: ("b", ["one", "two", "three", "four", "end"]),
        2: ("c", ["end"]),
    }
    env_pool = faulty(workers=1, **LIMITS.get(fault, {}))
    seen = play(env_pool, scripts)
    assert seen == {slot: faulty_env.trace(task, actions) for slot, (task, actions) in scripts.items()}
    assert env_pool.restarts == 1 or (fault in ("hang", "stop") and env_pool.restarts > 1)  # on a machine that is itself slow


def test_worker_killed_between_steps(faulty):
    env_pool = faulty(workers=1)
    actions = ["one", "two", "three"]
    env_pool.reset(0, {"id": "a", "type": "x"})
    seen = [env_pool.get(60)[1].text]
    for action in actions:
        os.kill(worker_pids(env_pool)[0], signal.SIGKILL)
        env_pool.step(0, action)
        seen.append(env_pool.get(60)[1].text)
    assert seen == faulty_env.trace("a", actions)
    assert env_pool.restarts == 3


def test_a_task_that_always_fails_is_named(faulty):
    env_pool = faulty(workers=1)
    env_pool.reset(0, {"id": "the-bad-one", "type": "x"})
    env_pool.reset(1, {"id": "good", "type": "x"})
    for _ in range(2):
        env_pool.get(60)
    env_pool.step(1, "one")
    env_pool.step(0, "exception always")
    seen = []
    with pytest.raises(UserError, match=r"3 times in a row on task 'the-bad-one'.*inside the game") as caught:
        for _ in range(2):
            seen.append(env_pool.get(60))
    assert "\n" not in str(caught.value)
    if not seen:
        seen.append(env_pool.get(60))  # the other episode goes on
    assert seen[0][0] == 1 and seen[0][1].text == faulty_env.trace("good", ["one"])[-1]


def test_a_task_that_never_answers_is_named(faulty):
    env_pool = faulty(workers=1, start=1.0, reset=0.2)
    env_pool.reset(0, {"id": "endless", "type": "x"})
    with pytest.raises(UserError, match="'endless': it gave no answer within 0.2 seconds"):
        env_pool.get(60)


def test_user_error_travels_and_the_worker_lives_on(faulty):
    env_pool = faulty(workers=1)
    env_pool.reset(0, {"id": "refused", "type": "x"})
    with pytest.raises(UserError, match="^the file of this task is broken; make it again.$"):
        env_pool.get(60)
    assert play(env_pool, {0: ("a", ["one"])})[0] == faulty_env.trace("a", ["one"])
    assert env_pool.restarts == 0


def test_an_environment_that_replays_differently_is_refused(faulty):
    env_pool = faulty(workers=1)
    play(env_pool, {1: ("b", ["one", "end"])})  # moves the process-wide counter that "count" shows
    env_pool.reset(0, {"id": "a", "type": "x"})
    env_pool.get(60)
    env_pool.step(0, "count")
    env_pool.get(60)
    env_pool.step(0, "die")
    with pytest.raises(UserError, match="came out differently"):
        env_pool.get(60)


def test_large_messages_both_ways_do_not_block(faulty):
    env_pool = faulty(workers=1)
    scripts = {slot: (f"t{slot}", ["x" * 300_000, "modules", "end"]) for slot in range(4)}
    seen = play(env_pool, scripts)
    for slot, (task, actions) in scripts.items():
        assert seen[slot][1] == faulty_env.trace(task, actions[:1])[-1]


def test_workers_import_no_jax_and_use_one_thread(faulty):
    seen = play(faulty(), {0: ("a", ["modules", "threads"])})[0]
    modules = seen[1].split()
    assert "epo_jax.envs.base" in modules
    assert not {"jax", "jaxlib", "flax", "numpy"} & set(modules)
    assert seen[2] == "1"


def test_slots_per_worker_starts_more_processes(faulty, monkeypatch):
    monkeypatch.setattr(faulty_env, "SLOTS_PER_WORKER", 2, raising=False)
    env_pool = faulty(workers=1)
    play(env_pool, {slot: (f"t{slot}", ["one"]) for slot in range(5)})
    assert sorted(len(worker.episodes) for worker in env_pool._workers) == [1, 2, 2]


def test_released_slots_are_not_played_again(faulty):
    env_pool = faulty(workers=1)
    play(env_pool, {0: ("a", ["one"] * 5), 1: ("b", ["one"])})
    env_pool.release(0)
    os.kill(worker_pids(env_pool)[0], signal.SIGKILL)
    env_pool.step(1, "count")
    assert env_pool.get(60)[1].text == "2"  # slot 1's recorded step and this one


def test_a_long_step_is_not_taken_for_silence(faulty):
    env_pool = faulty(silence=1.0)
    assert play(env_pool, {0: ("a", ["slow", "one"])})[0] == faulty_env.trace("a", ["slow", "one"])
    assert env_pool.restarts == 0


def started_in(env_pool):
    return [sorted(episode.task["id"] for episode in worker.episodes.values()) for worker in env_pool._workers]


def test_episodes_of_a_task_share_a_worker(faulty):
    env_pool = faulty(workers=2)
    for slot in range(8):
        env_pool.reset(slot, {"id": "ab"[slot // 4], "type": "x"})
    assert started_in(env_pool) == [["a"] * 4, ["b"] * 4]
    for slot in range(8, 24):
        env_pool.reset(slot, {"id": "a", "type": "x"})
    assert [len(ids) for ids in started_in(env_pool)] == [13, 11]  # but not where that would crowd it
    for _ in range(24):
        env_pool.get(60)


def test_a_reset_that_ran_ahead_is_there_at_once(faulty):
    env_pool = faulty(workers=1)
    play(env_pool, {0: ("a", ["one"])})
    env_pool.reset(7, {"id": "b", "type": "x"})
    env_pool.step(0, "die")
    seen = dict(env_pool.get(60) for _ in range(2))
    assert (seen[7].text, seen[0].text) == (faulty_env.trace("b", [])[0], faulty_env.trace("a", ["one", "die"])[-1])
    env_pool.step(7, "one")
    assert env_pool.get(60)[1].text == faulty_env.trace("b", ["one"])[-1]


def test_a_worker_that_has_grown_is_renewed(faulty, monkeypatch):
    monkeypatch.setattr(pool, "RECYCLED_ANSWERS", 3)
    env_pool = faulty(workers=1, memory_limit_mb=400)
    before = play(env_pool, {0: ("a", ["one", "two"]), 1: ("b", ["end"])})
    assert before[0] == faulty_env.trace("a", ["one", "two"])
    first = worker_pids(env_pool)
    env_pool.step(0, "grow")
    env_pool.get(60)
    assert play(env_pool, {1: ("c", ["one"])})[1] == faulty_env.trace("c", ["one"])
    assert worker_pids(env_pool) != first and (env_pool.recycled, env_pool.restarts) == (1, 0)
    env_pool.step(0, "three")
    assert env_pool.get(60)[1].text == faulty_env.trace("a", ["one", "two", "grow", "three"])[-1]


def test_closing_lets_workers_clean_up(faulty, tmp_path):
    env_pool = faulty(workers=1)
    play(env_pool, {0: ("a", ["child"])})
    processes = [int(pid) for pid in (tmp_path / "marker.children").read_text().split()]
    assert len(processes) == 1 and alive(processes[0])
    env_pool.close()
    assert (tmp_path / "marker.left").exists()  # written by an exit handler
    until = time.monotonic() + 20  # it has been killed; the system takes its time
    while alive(processes[0]) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(processes[0])


def test_misuse_is_refused(faulty):
    env_pool = faulty()
    with pytest.raises(ValueError, match="nothing to wait for"):
        env_pool.get(1)
    with pytest.raises(ValueError, match="reset it first"):
        env_pool.step(0, "one")
    env_pool.reset(0, {"id": "a", "type": "x"})
    with pytest.raises(ValueError, match="still busy"):
        env_pool.step(0, "one")
    env_pool.get(60)
    env_pool.step(0, "end")
    env_pool.get(60)
    with pytest.raises(ValueError, match="reset it first"):
        env_pool.step(0, "one")


def test_get_times_out(faulty):
    env_pool = faulty()
    env_pool.reset(0, {"id": "a", "type": "x"})
    env_pool.get(60)
    env_pool.step(0, "hang")
    with pytest.raises(TimeoutError):
        env_pool.get(0.2)


def test_host_time_per_message_is_small():
    task = toy.list_tasks("train", {})[0]
    with EnvPool("toy", {}, workers=1) as env_pool:
        env_pool.reset(0, task)
        env_pool.get(60)
        started = time.process_time()
        for _ in range(300):
            env_pool.reset(0, task)
            env_pool.get(60)
            env_pool.step(0, "red")
            env_pool.get(60)
        assert (time.process_time() - started) / 600 < 3e-4


@pytest.mark.parametrize("busy", [False, True])
def test_no_process_survives_a_killed_parent(busy, tmp_path):
    """Idle workers see their input close; a worker stuck in an environment sees that its parent has changed."""
    script = f"""
import time
from epo_jax.envs import base
from epo_jax.envs.workers.pool import EnvPool
base.ENVIRONMENTS["faulty"] = "tests.envs.workers.faulty_env"
pool = EnvPool("faulty", {{"marker": {str(tmp_path / "marker")!r}}}, 2)
for slot in range(2):
    pool.reset(slot, {{"id": "ab"[slot], "type": "x"}})
for slot in range(2):
    pool.get(60)
if {busy}:
    pool.step(0, "hang")
print(*[worker.process.pid for worker in pool._workers], flush=True)
time.sleep(100)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(alive(pid) for pid in workers)
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)


def test_unknown_environment_is_refused():
    with pytest.raises(UserError, match="'nowhere' is not an environment"):
        pool.EnvPool("nowhere", {}, 1)
