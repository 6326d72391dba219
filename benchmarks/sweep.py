"""A sweep against the same runs one after another: time, and memory of its members.

    python benchmarks/sweep.py                                  # 8 members of the laptop model, 20 RL steps; about 1.5 hours
    python benchmarks/sweep.py --members=2 --steps=2 --preset=smoke                   # a quick look
    python benchmarks/sweep.py --lora=FOLDER                    # peak memory of 8 LoRA members over a model against that of 1

Members differ in the weight of the entropy term. The sweep and each run are processes of their own, with nothing cached except
the games, so that start-up, behavior cloning and compilation count: once for the sweep, once for each run. The output includes
the distance of each member's parameters from those of the run with the same coefficients. `--runs=2` measures two of the runs
and assumes that the others take as long.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--runs", type=int, help="separate runs that are measured; all if left out")
    parser.add_argument("--lora", metavar="FOLDER", help="measure memory over this model instead")
    return parser.parse_args()


def measured(module: str, *settings: str) -> tuple[float, float, str]:
    """(seconds, peak GB of the process itself, what it printed) of `python -m module`."""
    command = [sys.executable, "-m", module, *settings]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        said.seek(0)
        text = said.read()
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{text[-2000:]}")
    return seconds, usage.ru_maxrss / 1e6, text


def parts(folders: list[Path], seconds: float) -> dict[str, float]:
    """Where the wall time went. `folders` are the run folders of one process."""
    from epo_jax.runs.metrics import read_rows

    rows = read_rows(folders[0] / "metrics.jsonl")
    each = {name: [row[f"{name}_seconds"] for row in rows] for name in ("rollout", "update")}
    usual = {name: statistics.median(values[1:] or values) for name, values in each.items()}
    evaluations = sum(row["seconds"] for row in read_rows(folders[0] / "eval.jsonl"))
    told = {name: len(rows) * value for name, value in usual.items()}
    told["first step, above the usual"] = sum(values[0] - usual[name] for name, values in each.items())
    told["evaluation"] = evaluations
    told["start, warm start, end"] = seconds - sum(map(sum, each.values())) - evaluations
    return told


def make_games(preset: str) -> None:
    """Games and expert episodes are made once and for all."""
    sys.path.insert(0, str(ROOT))
    from epo_jax.configs import alfworld
    from epo_jax.envs.base import environment
    from epo_jax.training.initial_policy import expert_demonstrations

    config = alfworld.get_config(preset)
    env, env_options = environment(config.env.name), config.env.to_dict()
    env.prepare(env_options)
    expert_demonstrations(config, env.list_tasks("train", env_options))


def trained(folder: Path, step: int):
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        saved = reader.restore(folder.absolute() / "checkpoints" / str(step) / "state")
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(saved["params"])])


def compare(options, folder: Path) -> None:
    weights = [round(0.005 * (i + 1), 4) for i in range(options.members)]
    shared = [f"--config.train.steps={options.steps}"]
    of_sweep = [
        f"--config=ablation:{options.preset}", "--config.sweep.arms=('grpo+epo',)", "--config.sweep.seeds=(0,)",
        f"--config.sweep.over.epo.lam={tuple(weights)}",
    ]  # fmt: skip
    make_games(options.preset)
    print(f"{options.members} members, {options.steps} RL steps, {options.preset}; load {os.getloadavg()[0]:.1f}")
    whole, _, _ = measured("epo_jax.sweep", *of_sweep, *shared, f"--workdir={folder}/sweep")
    members = [folder / "sweep" / "members" / f"grpo+epo-lam{lam:g}-seed0" for lam in weights]
    print(f"{'the sweep':28s} {whole:8.1f} s", flush=True)
    singles = []
    for i, lam in enumerate(weights[: options.runs]):
        own = [f"--config=alfworld:{options.preset}", f"--config.epo.lam={lam}"]
        singles.append(measured("epo_jax.main", *own, *shared, f"--workdir={folder}/run{i}")[0])
        gap = abs(trained(members[i], options.steps) - trained(folder / f"run{i}", options.steps)).max()
        print(f"{f'run {i}, lam {lam:g}':28s} {singles[-1]:8.1f} s   parameters differ by at most {gap:.1e}", flush=True)
    one_by_one = statistics.mean(singles) * options.members
    of_whole, of_single = parts(members, whole), parts([folder / "run0"], singles[0])
    print(f"\n{'seconds':30s} {'sweep':>9s} {'a run':>9s} {f'{options.members} runs':>9s}")
    for name, value in of_whole.items():
        print(f"{name:30s} {value:9.1f} {of_single[name]:9.1f} {options.members * of_single[name]:9.1f}")
    print(f"{'in all':30s} {whole:9.1f} {singles[0]:9.1f} {one_by_one:9.1f}")
    print(f"the sweep takes {whole / one_by_one:.2f} x; load {os.getloadavg()[0]:.1f}")


def memory(options, folder: Path) -> None:
    settings = [
        "--config=ablation:smoke", "--config.sweep.arms=('grpo+epo',)", "--config.sweep.seeds=(0,)",
        f"--config.model.path={options.lora}", "--config.model.lora_rank=16", "--config.warm_start.episodes=0",
        "--config.warm_start.copies=0", "--config.agent.max_tokens=768", "--config.train.rows_tokens=768",
        "--config.train.steps=1", "--config.eval.before=False",
    ]  # fmt: skip
    peak = {}
    for count in (1, options.members):
        over = f"--config.sweep.over.epo.lam={tuple(round(0.005 * (i + 1), 4) for i in range(count))}"
        _, peak[count], _ = measured("epo_jax.sweep", *settings, over, f"--workdir={folder}/members{count}")
        print(f"{count} LoRA members: {peak[count]:.2f} GB at the peak, {peak[count] / peak[1]:.2f} x one", flush=True)


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        (memory if options.lora else compare)(options, Path(folder))


if __name__ == "__main__":
    main()
