"""Evaluation: every episode of a fixed split, once, or several times each for pass@k.

    epo-jax evaluate runs/first --out=scores.json                     the newest checkpoint, or --step
    epo-jax evaluate runs/first --split=valid_unseen --samples=8      pass@1, @2, @4 and @8
    epo-jax evaluate Qwen/Qwen2.5-3B-Instruct --config=alfworld

`--config` defines the games and the prompts. Without it, a run is evaluated with its own config; a model needs one. Keys of a
config that is given can be overridden as elsewhere, `--config.rollout.slots=32`. On several hosts, start the same command on
each; every host plays its share (epo_jax/parallel/hosts.py).
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax

from epo_jax.command import (
    ArgumentParser,
    add_base_option,
    check_output,
    number_type,
    parse_config,
    run,
    write_output,
)
from epo_jax.common import compilation, progress
from epo_jax.common.errors import UserError
from epo_jax.envs.base import SPLITS, environment
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.parallel import hosts, mesh
from epo_jax.rollout.collect import check_devices
from epo_jax.rollout.prompts import rollout_config
from epo_jax.runs.folder import read_config
from epo_jax.runs.metrics import evaluation_table, plain
from epo_jax.runs.policies import is_run, load
from epo_jax.settings.describe import help_text
from epo_jax.settings.setting import COUNT, NOT_NEGATIVE, SEED, SHARE_ABOVE_0
from epo_jax.settings.table import SECTIONS
from epo_jax.training.evaluation import evaluate, evaluations


def main(argv: list[str]) -> None:
    options, rest = _parse(argv[1:])
    with hosts.joined(options):
        compilation.keep_programs()
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
            f"--config is missing: {options.checkpoint} is no run folder, so it has no game; add for example --config=alfworld."
        )
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    sampling = {name: config.eval[name] if given is None else given for name, given in sampling.items()}
    config.eval.update(sampling, splits=tuple(dict.fromkeys(options.split or config.eval.splits)))
    if options.temperature is not None:
        config.eval.also_temperatures = ()
    seed = config.seed if options.seed is None else options.seed
    env, env_options = environment(config.env.name), config.env.to_dict()
    env.prepare(env_options)
    tasks = {split: env.list_tasks(split, env_options) for split in config.eval.splits}
    task_ids = {split: [task["id"] for task in tasks[split]] for split in tasks}
    hosts.agree("config and tasks", [config.to_dict(), task_ids, sampling, seed, options.samples])
    print(mesh.devices_in_use(), flush=True)
    # A run may have been trained on more devices than there are here.
    devices, settings = mesh.make_mesh(**config.mesh.to_dict()) if rest else mesh.make_mesh(), rollout_config(config)
    if rest:
        check_devices(settings.devices)
    else:
        settings = dataclasses.replace(settings, devices=min(settings.devices, jax.local_device_count()))
    with progress.shown(f"reading the weights of {options.checkpoint}"):
        policy = load(options.checkpoint, options.step, config, devices, options.base)
    mesh.check(devices, policy.model, config.train.rows_tokens)
    rows = []
    with EnvPool(config.env.name, env_options, config.env.workers) as pool:
        for evaluation in evaluations(config.eval):
            played, sampled = tasks[evaluation.split], evaluation.sampling(config.eval)
            row, _ = evaluate(evaluation, played, policy, pool, settings, sampled, seed, options.samples)
            rows.append(row)
            print(evaluation_table(row), flush=True)
    if options.out is not None and hosts.is_first():
        about = {"checkpoint": options.checkpoint, "step": policy.step, **sampling, "seed": seed, "samples": options.samples}
        write_output(options.out, json.dumps(plain(about | {"splits": rows}), indent=1) + "\n")
        print(f"wrote {options.out}")


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and what is left for the config."""
    parser = ArgumentParser(prog="epo-jax evaluate", description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            epilog=help_text(SECTIONS, {}))  # fmt: skip
    parser.add_folder("checkpoint", "run folder, model folder or hub name")
    parser.add_argument("--step", type=number_type(int, NOT_NEGATIVE),
                        help="RL steps of the run's checkpoint; the newest if left out")  # fmt: skip
    parser.add_argument("--split", action="append", choices=SPLITS, help="may be given again; the config's if left out")
    parser.add_argument("--samples", default=1, type=number_type(int, COUNT),
                        help="times that each game is played; more than one for pass@k")  # fmt: skip
    parser.add_argument("--temperature", type=number_type(float, NOT_NEGATIVE),
                        help="0 = always the likeliest token; the config's if left out, as the next three")  # fmt: skip
    parser.add_argument("--top_k", type=number_type(int, NOT_NEGATIVE), help="0 = all tokens")
    parser.add_argument("--top_p", type=number_type(float, SHARE_ABOVE_0))
    parser.add_argument("--seed", type=number_type(int, SEED))
    add_base_option(parser)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    hosts.add_options(parser)
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    sys.exit(run(main))
