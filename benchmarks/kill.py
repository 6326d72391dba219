"""A run that is killed repeatedly must end like an uninterrupted one, bit for bit.

    python benchmarks/kill.py --count=20

The run is tiny, plays the toy game and saves a checkpoint after every RL step. In turn it is killed (SIGKILL) at a random moment,
killed while a checkpoint is being written, and stopped (SIGTERM); each time it is resumed. Then its final
state, the host state in the checkpoint, and the rows of metrics.jsonl, eval.jsonl and trajectories.jsonl are compared
with those of an uninterrupted run, times aside. If a run ends before all kills are used up, it is compared, and another
begins. The exit code is 0 if nothing differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from epo_jax.runs.metrics import read_rows
from epo_jax.settings.config import base_config

FILES = "metrics.jsonl", "eval.jsonl", "trajectories.jsonl"
STOPPED = 75


def get_config():
    """This file is the config of the runs, too."""
    config = base_config("toy")
    config.env.update(workers=1, max_turns=2)
    config.agent.update(style="bare", context="chat", response_tokens=5, max_tokens=64)
    config.model.update(path="", d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32, vocab_size=300)
    config.model.update(dtype="float32", remat="none")
    config.warm_start.update(episodes=30, steps=100, batch_tokens=1024, lr=1e-2)
    config.rollout.update(groups=4, group_size=4, slots=8, lanes=2)
    config.algo.update(mini_batches=2, micro_batch_rows=2, kl_controller="adaptive")
    config.epo.update(lam=0.01, alpha=2.0)
    config.optim.update(lr=3e-3)
    config.train.update(steps=8, rows_tokens=64, rows_policy_tokens=16)
    config.eval.update(every=2, splits=("valid_unseen",))
    config.metrics.update(trajectories_every=1)
    config.checkpoint.update(every=1)
    return config


def ending(folder: Path) -> dict:
    """Everything that two runs must agree on: arrays and host state of the newest checkpoint, and the rows without times."""
    import jax
    import orbax.checkpoint as ocp

    newest = max((f for f in (folder / "checkpoints").iterdir() if f.name.isdigit()), key=lambda f: int(f.name))
    with ocp.StandardCheckpointer() as reader:
        state = jax.tree.map(np.asarray, reader.restore(newest.absolute() / "state"))
    progress = json.loads((newest / "progress" / "metadata").read_text())
    found = {"checkpoint": newest.name, "progress": without_times(progress)}
    found |= {f"state{jax.tree_util.keystr(path)}": x.tobytes() for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return found | {file: [without_times(row) for row in read_rows(folder / file)] for file in FILES}


def without_times(row: dict) -> dict:
    return {name: value for name, value in row.items() if "second" not in name and not name.endswith("_mfu")}


def differences(one: dict, other: dict) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def start(folder: Path, cache: Path) -> subprocess.Popen:
    resume = ["--resume"] if (folder / "config.json").exists() else []
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    arguments = [f"--config={__file__}", f"--workdir={folder}", *resume]
    with open(f"{folder}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "epo_jax.main", *arguments], stdout=log, stderr=log, env=os.environ | kept
        )  # fmt: skip


def wait_for_save(folder: Path, process: subprocess.Popen) -> None:
    """Until a checkpoint is being written, but for those that a kill has left."""
    left = {f.name for f in (folder / "checkpoints").glob("*tmp*")}
    while process.poll() is None:
        if any(f.name not in left for f in (folder / "checkpoints").glob("*tmp*")):
            return
        time.sleep(0.001)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = Path(temporary), Path(temporary) / "cache"
        for name in ("first", "alone"):  # the first one compiles
            began = time.monotonic()
            if start(folder / name, cache).wait():
                sys.exit((folder / f"{name}.log").read_text()[-3000:])
            length = time.monotonic() - began
        alone = ending(folder / "alone")
        failed = differences(alone, ending(folder / "first"))
        print(f"a run takes {length:.1f} s; twice the same: {not failed}", flush=True)
        runs, kills = [folder / "killed0"], 0
        while True:
            process = start(runs[-1], cache)
            kind = ("at a random moment", "during a save", "asked to stop")[kills % 3]
            if kills < options.count:
                if kind == "during a save":
                    wait_for_save(runs[-1], process)
                    time.sleep(draw.uniform(0, 0.03))
                else:
                    time.sleep(draw.uniform(0, length))
                process.send_signal(signal.SIGTERM if kind == "asked to stop" else signal.SIGKILL)
            code = process.wait()
            if code < 0 or code == STOPPED:
                kills += 1
                saved = sorted(int(f.name) for f in (runs[-1] / "checkpoints").glob("*") if f.name.isdigit())
                half = len(list((runs[-1] / "checkpoints").glob("*tmp*")))
                print(f"{kills:3d}  {kind:18s}  exit {code:3d}  checkpoints {saved}  half written {half}", flush=True)
            elif code == 0:
                wrong = differences(alone, ending(runs[-1]))
                failed += wrong
                print(f"     the end; what differs: {', '.join(wrong) or 'nothing'}", flush=True)
                if kills >= options.count:
                    break
                runs.append(folder / f"killed{len(runs)}")
            else:
                sys.exit(f"exit code {code}:\n" + Path(f"{runs[-1]}.log").read_text()[-3000:])
    print(f"{kills} kills, {len(runs)} runs: " + ("DIFFERENT" if failed else "the same bit for bit"))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
