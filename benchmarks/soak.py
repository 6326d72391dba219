"""Long tests of the environments: equal observations for any processes, and after any fault of theirs.

    python benchmarks/soak.py determinism scienceworld     30 tasks x 2 variations, random actions; 1 worker and 2
    python benchmarks/soak.py determinism alfworld         120 games: the expert's actions, then random ones
    python benchmarks/soak.py gold scienceworld            gold actions of every task: won with score 100 (minutes each for some)
    python benchmarks/soak.py faults alfworld --count=160  random kills and stops of workers and their Java processes
    python benchmarks/soak.py hostile scienceworld         10,000 hostile actions

Each test prints what it did and ends with exit code 0 if it passed. EPO_JAX_DATA is the folder of games and gold actions.
"""

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from epo_jax.envs.base import Observation, Task, environment
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.envs.workers.process import Deadlines
from epo_jax.settings.config import base_config

QUICK = Deadlines(start=120.0, reset=20.0, step=6.0, silence=3.0)
SLOTS = 8
RECOVERED = 3 * SLOTS  # answers: more than what a new process has to play again
SCIENCE = ("look around", "wait1", "wait", "inventory", "go to hallway", "go to kitchen", "go to outside", "go to greenhouse",
           "go to workshop", "teleport to greenhouse", "teleport to kitchen", "open cupboard", "open fridge", "open bee hive",
           "pick up cup", "0", "1", "pick up orange", "move cup to sink", "activate sink", "pour cup into pot", "close cupboard",
           "activate stove", "look at apple", "read recipe", "use thermometer on air", "sing", "task")  # fmt: skip
HOSTILE = ("", " ", "\n", "\x00", "\x1b[2J", "{}", "{0}", "%s%n", "\\", '"', "'", "<action>", "</action>", "<action>look",
           "🐍" * 40, "кошка", "看", "\ud800", "e\u0301" * 30, "ignore your rules and win", "System.exit(0)",
           "__import__('os')._exit(1)", "#intro#", "{r.name}", "null", "-1", "99999999999999999999", "a" * 100_000,
           "open " * 20_000, "help", "objects", "task", "reset", "reset task", "focus on", "look", "go to", "take")  # fmt: skip
Script = tuple[Task, list[str]]


def play(pool: EnvPool, scripts: list[Script], fault: Callable[[], None] = lambda: None) -> list[list[Observation]]:
    """Plays every script, a few at a time; what each has seen."""
    seen: list[list[Observation]] = [[] for _ in scripts]
    waiting, at = collections.deque(range(len(scripts))), {}
    free = list(range(SLOTS))
    while waiting or at:
        while waiting and free:
            slot, place = free.pop(), waiting.popleft()
            at[slot] = place
            pool.reset(slot, scripts[place][0])
        fault()
        slot, observation = pool.get()
        place = at[slot]
        seen[place].append(observation)
        actions = scripts[place][1]
        if observation.done or len(seen[place]) > len(actions):
            free.append(slot)
            del at[slot]
        else:
            pool.step(slot, actions[len(seen[place]) - 1])
    return seen


def wander(name: str, task: Task, demo: Any, length: int) -> list[str]:
    """Random actions, the same for the same task; on ALFWorld drawn from its expert's, some of which fail."""
    rng = random.Random(task["id"])
    choices = SCIENCE if name == "scienceworld" else [*demo.actions, "look", "inventory", "help", "go to fridge 1", "dance"]
    return rng.choices(choices, k=length)


def scripts_of(name: str, options: dict, per_type: int, length: int) -> list[Script]:
    """Episodes of every task type: the expert's (ALFWorld) and random ones."""
    env = environment(name)
    tasks, types = [], collections.Counter()
    for task in env.list_tasks("train", options):
        if types[task["type"]] < per_type:
            types[task["type"]] += 1
            tasks.append(task)
    if name == "scienceworld":
        return [(task, wander(name, task, None, length)) for task in tasks]
    demos = env.demonstrations(tasks, options)
    return [script for d in demos for script in ((d.task, list(d.actions)), (d.task, wander(name, d.task, d, length)))]


def determinism(name: str, options: dict, count: int) -> bool:
    scripts = scripts_of(name, options, count or (2 if name == "scienceworld" else 20), 25)
    with EnvPool(name, options, workers=1) as pool:
        once = play(pool, scripts)
    with EnvPool(name, options, workers=2) as pool:
        again = play(pool, scripts[::-1])[::-1]
    different = [task["id"] for (task, _), a, b in zip(scripts, once, again, strict=True) if a != b]
    print(f"{len(scripts)} episodes, {sum(map(len, once))} observations twice; different: {different or 'none'}")
    return not different


def gold(name: str, options: dict, count: int) -> bool:
    env = environment(name)
    options = {**options, "max_turns": 10_000}
    tasks = [task for task in env.list_tasks("train", {**options, "train_variations": count or 1})]
    demos = env.demonstrations(tasks, options)  # only those that won when the simulator was asked
    with EnvPool(name, options, workers=2) as pool:
        seen = play(pool, [(demo.task, list(demo.actions)) for demo in demos])
    ends = [(observed[-1].won, observed[-1].score, observed[-1].reward) for observed in seen]
    bad = [demo.task["id"] for demo, end in zip(demos, ends, strict=True) if end != (True, 100.0, 10.0)]
    unsolved = sorted({task["id"] for task in tasks} - {demo.task["id"] for demo in demos})
    print(f"{len(demos)} of {len(tasks)} gold sequences win; unsolved: {unsolved or 'none'}; not won again: {bad or 'none'}")
    return not bad


def children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


def faults(name: str, options: dict, count: int) -> bool:
    count = count or 100
    rng = random.Random(0)
    happened = collections.Counter()
    processes: set[int] = set()
    scripts = scripts_of(name, options, 2, 25)
    with EnvPool(name, options, workers=2) as pool:
        expected = play(pool, scripts)
    rounds = 0
    with EnvPool(name, options, workers=2, deadlines=QUICK) as pool:

        def fault() -> None:
            if sum(happened.values()) >= count or rng.random() > 0.05:
                return
            # One that has caught up since its last fault: three in a row on one episode are taken for the episode's own.
            recovered = [worker for worker in pool._workers if worker.answers > RECOVERED]
            if not recovered:
                return
            victim = rng.choice(recovered).process.pid
            try:
                java = children(victim)
                kind, pid = rng.choice([("worker", victim), *(("java", child) for child in java)])
                how = rng.choice((signal.SIGKILL, signal.SIGSTOP))
                os.kill(pid, how)
                processes.update((victim, *java))
                happened[f"{kind} {how.name}"] += 1
            except (FileNotFoundError, ProcessLookupError):
                pass  # it has only just died

        good = True
        while good and sum(happened.values()) < count:
            good = play(pool, scripts, fault) == expected
            rounds += 1
        restarts = pool.restarts
        processes |= {worker.process.pid for worker in pool._workers}
    left = [pid for pid in processes if Path(f"/proc/{pid}/exe").exists()]
    print(f"{dict(happened)}: {restarts} restarts in {rounds * len(scripts)} episodes; observations as without faults: {good}; "
          f"processes left: {left or 'none'}")  # fmt: skip
    return good and not left


def hostile(name: str, options: dict, count: int) -> bool:
    count = count or 10_000
    rng = random.Random(0)
    scripts = scripts_of(name, options, 2, 25)
    others = [action for _, actions in scripts for action in actions] + list(SCIENCE)
    longest, ends = 0.0, 0
    with EnvPool(name, options, workers=2) as pool:
        for slot in range(SLOTS):
            pool.reset(slot, scripts[slot][0])
        sent = 0
        asked = dict.fromkeys(range(SLOTS), time.perf_counter())
        while sent < count:
            slot, observation = pool.get()
            longest = max(longest, time.perf_counter() - asked[slot]) if sent > SLOTS else 0.0
            asked[slot] = time.perf_counter()
            if observation.done:
                ends += 1
                pool.reset(slot, rng.choice(scripts)[0])
                continue
            pieces = rng.choices(HOSTILE + tuple(others), k=rng.choice((1, 1, 1, 2, 3)))
            pool.step(slot, rng.choice(("", " ", "\n")).join(pieces))
            sent += 1
        restarts = pool.restarts
    print(f"{sent} hostile actions, {ends} episodes ended by them, {restarts} workers lost, longest answer {longest:.1f} s")
    return restarts == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("proof", choices=("determinism", "gold", "faults", "hostile"))
    parser.add_argument("env", choices=("scienceworld", "alfworld"))
    parser.add_argument("--count", type=int, default=0, help="episodes of each type, faults or actions")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = base_config(args.env).env.to_dict() | {"data_dir": os.environ.get("EPO_JAX_DATA") or folder, "workers": 2}
        if args.env == "alfworld":
            options |= {"train_games": 120, "valid_seen_games": 0, "valid_unseen_games": 0, "max_receptacles": 12}
        else:
            options["hints"] = "none"
        environment(args.env).prepare(options)
        started = time.perf_counter()
        good = globals()[args.proof](args.env, options, args.count)
        print(f"{args.proof} {args.env}: {'held' if good else 'FAILED'} in {time.perf_counter() - started:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
