"""The same run on one process and on several, all on this machine: what they learn must agree.

    python benchmarks/hosts.py                      # 1, 2 and 4 processes
    python benchmarks/hosts.py --processes=2 --config=configs/alfworld.py:smoke

Each count trains two RL steps in a folder of its own, its processes on loopback with a CPU device each. Prints the seconds and
the largest difference of a parameter from that of the first count.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp


def train(count: int, config: str, workdir: Path, options: list[str]) -> float:
    """Seconds that `count` processes take for two RL steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "epo_jax.main", f"--config={config}", f"--workdir={workdir}", "--config.train.steps=2"]
    started = time.perf_counter()
    running = [
        subprocess.Popen(
            [*command, *options, *([f"--coordinator={address}", f"--processes={count}", f"--process={i}"] if count > 1 else [])],
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL,
        )
        for i in range(count)
    ]  # fmt: skip
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit(f"{count} processes ended with {codes}")
    return time.perf_counter() - started


def learnt(workdir: Path):
    """The parameters after two RL steps, on one device."""
    folder = workdir.absolute() / "checkpoints" / "2" / "default"
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), stored)
        return jax.tree.map(np.asarray, checkpointer.restore(folder, like)["params"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--config", default="tests/toy_sweep.py")
    # Adam divides by the size of a gradient, and so makes much of the rounding of one that is nearly 0.
    parser.add_argument("--options", nargs="*", default=["--config.optim.lr=3e-4", "--config.warm_start.lr=1e-3"])
    arguments = parser.parse_args()
    first = None
    for count in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            seconds = train(count, arguments.config, Path(folder) / "run", arguments.options)
            params = learnt(Path(folder) / "run")
        first = params if first is None else first
        apart = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, first)))
        print(f"{count} processes: {seconds:.0f} s, largest difference of a parameter {apart:.1e}", flush=True)


if __name__ == "__main__":
    main()
