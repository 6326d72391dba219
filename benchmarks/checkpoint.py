"""Time that checkpointing adds to an RL step of the laptop preset.

    python benchmarks/checkpoint.py                               # 6 rounds of 5 updates with and 5 without; about 4 minutes
    python benchmarks/checkpoint.py --rollout=20                  # as a share of a step whose rollout takes 20 seconds
    python benchmarks/checkpoint.py --rounds=1 --updates=1 --rows=4             # a quick look

Updates with a save after each alternate with updates without. A save returns once the arrays are copied; the rest is written
while the next steps run, which slows them. The measured time therefore goes from the first update to the end of the last one and
of its save. Rounds go A B B A.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from epo_jax.configs.alfworld import get_config
from epo_jax.models.decoder import decoder_config, init_params
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.runs import checkpoint
from epo_jax.training.batch import step_batch
from epo_jax.training.from_config import learner_config, objective_and_hyper
from epo_jax.training.state import init_state
from epo_jax.training.step import make_train_step


def trajectories(config, rows: int, vocabulary: int) -> list[Trajectory]:
    """Random episodes that fill about `rows` rows of the learner's."""
    rng, out = np.random.default_rng(0), []
    episodes = config.rollout.groups * config.rollout.group_size
    turns = max(1, min(config.env.max_turns, round(rows * config.train.rows_tokens / episodes / 40)))
    for i in range(episodes):
        t = Trajectory(task={"id": str(i), "type": "t"}, group=i // config.rollout.group_size)
        for turn in range(turns):
            t.append_observation("")
            t.append_prompt(rng.integers(0, vocabulary, 30).tolist())
            t.append_answer(rng.integers(0, vocabulary, 8).tolist(), [-3.0] * 8, [3.0] * 8)
            t.actions.append("")
            t.valid.append(True)
            t.rewards.append(10.0 * (i % 3 == 0 and turn == turns - 1))
        out.append(t)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--updates", type=int, default=5, help="RL steps' updates in a row")
    parser.add_argument("--rows", type=int, default=60, help="of a batch")
    parser.add_argument("--rollout", type=float, default=0.0, help="seconds of a rollout, to add to the step")
    options = parser.parse_args()

    config = get_config("laptop")
    model = decoder_config(config.model)
    objective, hyper = objective_and_hyper(config)
    learner = learner_config(config, model, objective)
    state = init_state(learner, jax.jit(init_params, static_argnums=0)(model, jax.random.key(0)))
    batch = step_batch(config, objective, 0, trajectories(config, options.rows, model.vocab_size), learner.micro_rows)
    train_step = make_train_step(learner)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    state, _ = jax.block_until_ready(train_step(state, batch, hyper))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    blocked = []
    with tempfile.TemporaryDirectory() as folder:
        with checkpoint.open_manager(checkpoint.place(Path(folder)), config.checkpoint.keep) as manager:
            checkpoint.save(manager, state)
            manager.wait_until_finished()
            for i in range(2 * options.rounds):
                saves = i % 4 in (1, 2)
                started = time.perf_counter()
                for _ in range(options.updates):
                    state, _ = jax.block_until_ready(train_step(state, batch, hyper))
                    if saves:
                        called = time.perf_counter()
                        checkpoint.save(manager, state)
                        blocked.append(time.perf_counter() - called)
                manager.wait_until_finished()
                seconds[saves].append((time.perf_counter() - started) / options.updates)
    without, with_ = (statistics.median(seconds[key]) for key in (False, True))
    step = without + options.rollout
    print(f"state of {size:.1f} MB, {int(batch.rows.sum())} rows; load {os.getloadavg()[0]:.1f}")
    waited = 1e3 * statistics.median(blocked)
    print(f"update without {without:.3f} s, with a save after each {with_:.3f} s, which returned after {waited:.0f} ms")
    print(f"a save costs {1e3 * (with_ - without):.0f} ms, {100 * (with_ - without) / step:.2f} % of a step of {step:.1f} s")
    every = config.checkpoint.every
    print(f"with the preset's checkpoint.every={every}: {100 * (with_ - without) / step / every:.3f} %")


if __name__ == "__main__":
    main()
