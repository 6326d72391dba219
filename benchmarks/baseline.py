"""Short fixed runs whose numbers a change of the code must not move.

    python -m benchmarks.baseline record FILE.json             run every case, store what it computed
    python -m benchmarks.baseline compare FILE.json [CASE...]  run them again; exit code 1 if a number moved

Run `record` before a change and `compare` after it, on the same machine: other CPUs round differently, so the file is not part
of the repository. A case is a command, as a user would type it. What is compared is every row of metrics.jsonl and eval.jsonl,
times aside, and a digest of every array of the last checkpoint. Numbers that were not recorded are counted, but are no change.
JAX's compilation cache, in FILE.json's folder, makes a second run of an unchanged program quick.
"""

import argparse
import concurrent.futures
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).resolve().parents[1]
FILE = "tests/toy_sweep.py"

# The end of a line about a number that only one of two results has.
REMOVED, ADDED = ": only before", ": only now"


class Case(NamedTuple):
    """A command: its options, devices of each process, number of processes, and whether it is killed and resumed."""

    options: tuple[str, ...]
    program: str = "main"
    devices: int = 1
    processes: int = 1
    killed: bool = False


def _options(source: str, options: tuple[str, ...]) -> tuple[str, ...]:
    return (f"--config={FILE}{source}", *(f"--config.{option}" for option in ("warm_start.steps=40", *options)))


def single(*options: str, **how) -> Case:
    return Case(_options(":single", options), **how)


def sweep(*options: str, source: str = "", **how) -> Case:
    return Case(_options(source, options), "sweep", **how)


CASES = {
    "chat": single(),
    "killed": single(killed=True),
    "window": single(
        "agent.context=window", "epo.scope=trajectory", "epo.history_index=turn", "algo.epochs=2", "algo.kl_coef=0.05",
    ),
    "bfloat16": single(
        "agent.context=window", "model.dtype=bfloat16", "model.remat=full", "warm_start.optimizer=muon", "warm_start.lr=0.02",
        "rollout.cache_dtype=int8", "algo.kl_coef=0.05", "algo.kl_kind=full",
    ),
    "ppo": single("algo.name=ppo+epo", "algo.kl_coef=0.05", "algo.kl_controller=adaptive"),
    "ppo_trunk": single(
        "algo.name=ppo+epo", "agent.context=window", "algo.gae_scope=turn", "algo.kl_coef=0.05", "algo.kl_place=reward",
        "algo.critic=trunk",
    ),
    "ppo_lora": single("algo.name=ppo+epo", "algo.critic=lora", "model.lora_rank=2", "algo.kl_coef=0.05"),
    "gigpo": single("algo.name=gigpo+epo_decay", "algo.format_penalty_place=before"),
    "gspo": single("algo.name=gspo+epo", "agent.context=window"),
    "dapo": single("algo.name=dapo+epo+clip_cov", "epo.history=sliding"),
    "siren": single("algo.name=reinforce_pp_baseline+siren", "algo.importance_cap=2.0"),
    "empg": single("algo.name=rloo+empg+target"),
    "released": single(
        "algo.name=grpo+epo+released", "algo.epochs=2", "algo.mini_batch_turns=8", "algo.micro_batch_turns=4",
    ),
    "released_ppo": single(
        "algo.name=ppo+epo+released", "agent.context=window", "algo.mini_batch_turns=8", "algo.micro_batch_turns=4",
    ),
    "mesh": single("mesh.data=2", "mesh.fsdp=2", "algo.kl_coef=0.05", devices=8),
    "mesh_ppo": single(
        "algo.name=ppo+epo", "agent.context=window", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "model.num_kv_heads=2",
        "warm_start.optimizer=muon", "warm_start.lr=0.02", devices=8,
    ),
    "two_processes": single("mesh.data=2", processes=2),
    "sweep": sweep("sweep.arms=('grpo', 'grpo+epo')", "sweep.seeds=(0, 1)"),
    "sweep_mapped": sweep("sweep.seeds=(0, 1)", "sweep.over.epo.lam=(0.001, 0.1)", "sweep.at_once=2", devices=2),
    "sweep_lora": sweep("sweep.over.optim.lr=(0.001, 0.01)", source=":lora"),
}  # fmt: skip

# Parts of the names of metrics that are times.
TIMES = ("seconds", "per_second", "utilisation", "utilization", "flops")


def start(case: Case, workdir: Path, cache: Path, *more: str) -> list[subprocess.Popen]:
    """Starts a case's processes; what they print goes to `workdir`.log."""
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={case.devices}",
    }  # fmt: skip
    command = [sys.executable, "-m", f"epo_jax.{case.program}", *case.options, f"--workdir={workdir}", *more]
    with socket.socket() as free, open(f"{workdir}.log", "a") as log:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        hosts = [f"--coordinator={address}", f"--processes={case.processes}"] if case.processes > 1 else []
        own = [[*hosts, f"--process={i}"] if hosts else [] for i in range(case.processes)]
        return [subprocess.Popen([*command, *some], cwd=ROOT, env=environment, stdout=log, stderr=log) for some in own]


def play(name: str, folder: Path, cache: Path) -> dict:
    """Runs a case to its end and returns what it computed, by run folder."""
    case, workdir = CASES[name], folder / name
    processes = start(case, workdir, cache)
    if case.killed:
        rows = workdir / "metrics.jsonl"
        while processes[0].poll() is None and not (rows.exists() and rows.read_text().count("\n") >= 2):
            time.sleep(0.01)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        processes = start(case._replace(options=()), workdir, cache, "--resume")
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{name} failed:\n" + Path(f"{workdir}.log").read_text()[-3000:])
    runs = sorted(workdir.glob("members/*")) or [workdir]
    return {str(run.relative_to(folder)): numbers(run) for run in runs}


def numbers(run: Path) -> dict:
    """Rows of metrics and evaluations, times aside, and a digest of every array of the newest checkpoint."""
    found = {}
    for file in ("metrics", "eval"):
        path = run / f"{file}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        rows = [{key: value for key, value in row.items() if not any(part in key for part in TIMES)} for row in rows]
        found[file] = sorted(rows, key=lambda row: (row["step"], row.get("split", "")))
    newest = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    folder, handler = run / "checkpoints" / str(newest) / "state", ocp.PyTreeCheckpointHandler()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=device), handler.metadata(folder).tree)
    state = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=placed))
    found["state"] = {
        jax.tree_util.keystr(path, simple=True, separator="."): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()[:16]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    return found


def moved(before, now, where: str = "") -> list[str]:
    """A line for each difference of two results."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = [f"{where} {key}{REMOVED if key in before else ADDED}" for key in sorted(before.keys() ^ now.keys())]
        for key in sorted(before.keys() & now.keys()):
            lines += moved(before[key], now[key], f"{where} {key}")
        return lines
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [line for i, pair in enumerate(zip(before, now, strict=True)) for line in moved(*pair, f"{where}[{i}]")]
    if before == now:
        return []
    by = ""
    if isinstance(before, float) and isinstance(now, float):
        by = f" (by {abs(now - before) / max(abs(before), math.ulp(1.0)):.1e})"
    return [f"{where}: {before} -> {now}{by}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    parser.add_argument("--jobs", type=int, default=2, help="cases that run at the same time")
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"unknown case {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}")
    file, names, status = options.file.absolute(), options.cases or list(CASES), 0
    stored = json.loads(file.read_text()) if file.exists() else {}
    folder, started = Path(tempfile.mkdtemp(prefix="baseline-")), time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as executor:
        results = executor.map(lambda name: play(name, folder, file.parent / "jax-cache"), names)
        for name, result in zip(names, results, strict=True):
            message = "recorded"
            if options.mode == "record":
                stored[name] = result
                file.write_text(json.dumps(stored))
            elif name not in stored:
                message, status = "was not recorded", 1
            else:
                lines = moved(stored[name], json.loads(json.dumps(result)))
                changes = [line for line in lines if not line.endswith(ADDED)]
                message = f"same, and {len(lines)} numbers that were not recorded" if lines else "same"
                if changes:
                    message, status = f"moved in {len(changes)} places:\n" + "\n".join(changes[:8]), 1
            print(f"{name}: {message}  ({time.perf_counter() - started:.0f} s)", flush=True)
    shutil.rmtree(folder)
    return status


if __name__ == "__main__":
    sys.exit(main())
