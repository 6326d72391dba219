"""The worker pool against the reference implementation's scheme: start-up, resets, steps and memory of N environments.

    python benchmarks/envs.py scienceworld --stock=4 --ours=4,64
    python benchmarks/envs.py alfworld --stock=8 --ours=8,64

The reference implementation has one process for each environment, steps all of them in lock-step and lists every valid action at
each step (`stock_env.py`); on ScienceWorld each has a Java process with the default heap. The pool has two workers, or more if
two cannot hold that many; it lists the objects in reach (ScienceWorld) or the admissible commands (ALFWorld) at each step, and is
deterministic. Both play groups of 8 on the same task with the same random actions; on ALFWorld their transcripts are
compared. 64 of the stock environments do not fit in every memory, so each side has its own number of environments: compare per
environment.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from epo_jax.envs.base import environment
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.settings.config import base_config

GROUP = 8
WANDERINGS = ("wait1", "look around", "go to greenhouse", "go to outside", "go to kitchen", "go to hallway", "inventory",
              "pick up egg", "open cupboard", "open door to kitchen", "pour cup into sink", "activate stove")  # fmt: skip


def chosen_action(name: str, admissible, rng: random.Random) -> str:
    return rng.choice(WANDERINGS if name == "scienceworld" else sorted(set(admissible) - {"help"}))


def memory_mb(parents: list[int]) -> float:
    """Proportional set size of processes and all their descendants."""
    total, left = 0.0, list(parents)
    while left:
        pid = left.pop()
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
            for thread in Path(f"/proc/{pid}/task").iterdir():
                left += [int(child) for child in (thread / "children").read_text().split()]
        except (OSError, StopIteration):
            continue
    return total


class Stock:
    """The released scheme."""

    def __init__(self, name: str, count: int):
        program = str(Path(__file__).with_name("stock_env.py"))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen([sys.executable, program, name], text=True, bufsize=1, env=env, **pipes) for _ in range(count)
        ]

    def all(self, requests: list[dict]) -> list[dict]:
        """One lock-step round."""
        for process, request in zip(self.processes, requests, strict=True):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in self.processes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def run_stock(name: str, tasks: list[dict], count: int, steps: int) -> tuple[dict[str, float], list]:
    started = time.perf_counter()
    stock = Stock(name, count)
    stock.all([{"task": task} for task in tasks])
    ready = time.perf_counter()
    answers = stock.all([{"task": task} for task in tasks])
    reset = time.perf_counter()
    rngs = [random.Random(i) for i in range(count)]
    seen = [[] for _ in range(count)]
    for _ in range(steps):
        actions = [chosen_action(name, a["admissible"], rng) for a, rng in zip(answers, rngs, strict=True)]
        answers = stock.all([{"action": action} for action in actions])
        for texts, answer in zip(seen, answers, strict=True):
            texts.append(answer["text"])
    ended = time.perf_counter()
    memory = memory_mb([process.pid for process in stock.processes])
    stock.close()
    return numbers(ready - started, count / (reset - ready), count * steps / (ended - reset), memory / count), seen


def run_ours(name: str, options: dict, tasks: list[dict], count: int, steps: int) -> tuple[dict[str, float], list]:
    def resets() -> list:
        for slot, task in enumerate(tasks):
            pool.reset(slot, task)
        return [observation for _, observation in sorted(pool.get() for _ in range(count))]

    started = time.perf_counter()
    with EnvPool(name, options, workers=2) as pool:
        resets()
        ready = time.perf_counter()
        rngs = [random.Random(i) for i in range(count)]
        seen = [[] for _ in range(count)]
        observations = resets()
        reset = time.perf_counter()
        left = 0
        for slot, observation in enumerate(observations):
            pool.step(slot, chosen_action(name, observation.admissible, rngs[slot]))
            left += 1
        done = 0
        while left:
            slot, observation = pool.get()
            left -= 1
            done += 1
            seen[slot].append(observation.text)
            if len(seen[slot]) < steps and not observation.done:
                pool.step(slot, chosen_action(name, observation.admissible, rngs[slot]))
                left += 1
        ended = time.perf_counter()
        memory = memory_mb([worker.process.pid for worker in pool._workers])
    return numbers(ready - started, count / (reset - ready), done / (ended - reset), memory / count), seen


def numbers(start: float, resets: float, steps: float, memory: float) -> dict[str, float]:
    return {"start-up s": start, "resets/s": resets, "steps/s": steps, "MB each": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=("alfworld", "scienceworld"))
    parser.add_argument("--stock", type=int, default=4, help="environments of the released scheme; 0 = leave it out")
    parser.add_argument("--ours", default="4,64", help="numbers of environments of the pool")
    parser.add_argument("--steps", type=int, default=20, help="steps of each environment")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = base_config(args.name).env.to_dict() | {"data_dir": os.environ.get("EPO_JAX_DATA") or folder}
        if args.name == "alfworld":
            options |= {"train_games": 12, "valid_seen_games": 0, "valid_unseen_games": 0}
        env = environment(args.name)
        env.prepare(options)
        every = env.list_tasks("train", options)
        random.Random(0).shuffle(every)

        def tasks(count: int) -> list[dict]:
            return [every[i // GROUP % len(every)] for i in range(count)]

        print(f"{args.name}, {args.steps} steps each, load {os.getloadavg()[0]:.1f}\n\n| scheme | N | ", end="")
        print(" | ".join(numbers(0, 0, 0, 0)), "|\n|", "--- | " * 6)

        def show(scheme: str, count: int, measured: dict[str, float]) -> None:
            print(f"| {scheme} | {count} | " + " | ".join(f"{value:.3g}" for value in measured.values()) + " |", flush=True)

        if args.stock:
            measured, theirs = run_stock(args.name, tasks(args.stock), args.stock, args.steps)
            show("one process each, lock-step", args.stock, measured)
        for count in map(int, args.ours.split(",")):
            measured, ours = run_ours(args.name, options, tasks(count), count, args.steps)
            show("pool", count, measured)
            if args.stock and args.name == "alfworld":
                same = sum(a[: len(b)] == b for a, b in zip(theirs, ours, strict=False))
                print(f"  transcripts equal to the stock engine's: {same} of {min(args.stock, count)}")


if __name__ == "__main__":
    main()
