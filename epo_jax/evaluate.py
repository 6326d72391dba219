"""Evaluation: every episode of a fixed split, once, or several times each for pass@k.

    python -m epo_jax.evaluate --checkpoint=runs/first --out=scores.json                  the newest checkpoint, or --step
    python -m epo_jax.evaluate --checkpoint=runs/first --split=valid_unseen --samples=8   pass@1, @2, @4 and @8
    python -m epo_jax.evaluate --checkpoint=Qwen/Qwen2.5-3B-Instruct --config=configs/alfworld.py

`--config` says what is played and how the policy is prompted. A run has its own, which is taken where --config is left out;
a model needs one. Keys of a config that is given can be overridden as elsewhere, `--config.rollout.slots=32`. On several hosts
each of them runs the same command and plays its share (epo_jax/hosts.py).
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax

from epo_jax import hosts, keys, mesh
from epo_jax.command import (
    ArgumentParser,
    add_base_option,
    check_output,
    number_type,
    parse_config,
    read_config,
    run,
    write_output,
)
from epo_jax.config import SEED_RULE, is_seed
from epo_jax.envs.base import SPLITS, Task, environment
from epo_jax.envs.pool import EnvPool
from epo_jax.errors import UserError
from epo_jax.folders import is_run, load
from epo_jax.metrics import Outcome, Row, evaluation_row, evaluation_table, plain
from epo_jax.models.decoder import DecoderConfig, Params
from epo_jax.models.tokenizer import ChatTokenizer
from epo_jax.prompting import RolloutConfig, rollout_config
from epo_jax.rollout import Episode, check_devices, collect, warn_full
from epo_jax.trajectory import Trajectory


def main(argv: list[str]) -> None:
    options, rest = _parse(argv[1:])
    with hosts.joined(options):
        _score(options, rest)


def _score(options: argparse.Namespace, rest: list[str]) -> None:
    if options.out is not None and hosts.is_first():
        check_output(options.out, "scores.json")
    if rest:
        config = parse_config(rest)
    elif is_run(options.checkpoint):
        config = read_config(options.checkpoint)
    else:
        raise UserError(
            f"--config is missing: {options.checkpoint} is no run folder, so it has no game; add for example "
            "--config=configs/alfworld.py."
        )
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    sampling = {name: config.eval[name] if given is None else given for name, given in sampling.items()}
    seed = config.seed if options.seed is None else options.seed
    env, env_options = environment(config.env.name), config.env.to_dict()
    env.prepare(env_options)
    tasks = {split: env.list_tasks(split, env_options) for split in options.split or config.eval.splits}
    task_ids = {split: [task["id"] for task in tasks[split]] for split in tasks}
    hosts.agree("config and tasks", [config.to_dict(), task_ids, sampling, seed, options.samples])
    print(mesh.devices_in_use(), flush=True)
    # A run may have been trained on more devices than there are here.
    devices, settings = mesh.make_mesh(**config.mesh.to_dict()) if rest else mesh.make_mesh(), rollout_config(config)
    if rest:
        check_devices(settings.devices)
    else:
        settings = dataclasses.replace(settings, devices=min(settings.devices, jax.local_device_count()))
    policy = load(options.checkpoint, options.step, config, devices, options.base)
    mesh.check(devices, policy.model, config.train.rows_tokens)
    rows = []
    with EnvPool(config.env.name, env_options, config.env.workers) as pool:
        for split in tasks:
            row, _ = evaluate(
                split, tasks[split], policy.step, pool, policy.tokenizer, policy.model, policy.params,
                settings, seed=seed, samples=options.samples, **sampling,
            )  # fmt: skip
            rows.append(row)
            print(evaluation_table(row), flush=True)
    if options.out is not None and hosts.is_first():
        about = {"checkpoint": options.checkpoint, "step": policy.step, **sampling, "seed": seed, "samples": options.samples}
        write_output(options.out, json.dumps(plain(about | {"splits": rows}), indent=1) + "\n")
        print(f"wrote {options.out}")


def evaluate(
    split: str,
    tasks: list[Task],
    step: int | None,
    pool: EnvPool,
    tokenizer: ChatTokenizer,
    model: DecoderConfig,
    params: Params,
    config: RolloutConfig,
    temperature: float,
    seed: int,
    top_k: int = 0,
    top_p: float = 1.0,
    samples: int = 1,
) -> tuple[Row, list[Trajectory]]:
    """Plays each of `tasks` `samples` times; the row of eval.jsonl and the trajectories, those of a task side by side.

    The sampling key depends on `seed` alone, so two evaluations of the same parameters agree, and the first play of a task
    does not depend on how many follow.
    """
    key = keys.key(seed, "evaluation")
    trajectories, stats = collect(
        episodes_of(tasks, samples), pool, tokenizer, model, params, key, config, temperature, top_k, top_p
    )
    warn_full(trajectories, config)
    return row_of(split, step, trajectories, stats.seconds), trajectories


def episodes_of(tasks: list[Task], samples: int = 1) -> list[Episode]:
    """`samples` episodes of each task."""
    return [Episode(play * len(tasks) + i, task, group=i) for i, task in enumerate(tasks) for play in range(samples)]


def row_of(split: str, step: int | None, trajectories: list[Trajectory], seconds: float) -> Row:
    """The row of eval.jsonl that the episodes of a split come to."""
    outcomes = (
        Outcome(t.task["type"], t.task["id"], t.won, t.score, len(t.actions), len(t.valid) - sum(t.valid)) for t in trajectories
    )
    full = sum(t.full for t in trajectories) / max(len(trajectories), 1)
    return evaluation_row(step, split, outcomes) | {"full_context": full, "seconds": seconds}


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and what is left for the config."""
    parser = ArgumentParser(prog="python -m epo_jax.evaluate", description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    count = number_type(int, lambda value: value >= 0, "a whole number, zero or positive")
    parser.add_argument("--checkpoint", required=True, help="run folder, model folder or hub name")
    parser.add_argument("--step", type=count, help="RL steps of the run's checkpoint; the newest if left out")
    parser.add_argument("--split", action="append", choices=SPLITS, help="may be given again; the config's if left out")
    parser.add_argument("--samples", default=1, type=number_type(int, lambda v: v > 0, "a positive whole number"),
                        help="times that each game is played; more than one for pass@k")  # fmt: skip
    parser.add_argument("--temperature", type=number_type(float, lambda v: v >= 0, "zero or positive"),
                        help="0 = always the likeliest token; the config's if left out, as the next three")  # fmt: skip
    parser.add_argument("--top_k", type=count, help="0 = all tokens")
    parser.add_argument("--top_p", type=number_type(float, lambda v: 0 < v <= 1, "in (0, 1]"))
    parser.add_argument("--seed", type=number_type(int, is_seed, SEED_RULE))
    add_base_option(parser)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    hosts.add_options(parser)
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    sys.exit(run(main))
