"""Commands as several processes on this machine, which find each other on loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests import xla

ROOT = Path(__file__).resolve().parents[1]


class Processes:
    """A command of Python as `count` processes with so many devices each, killed at the end of `with`; what process i says goes
    to `folder`/said.i.

    Args:
        only: more arguments for some of them.
    """

    def __init__(self, count: int, folder: Path, *command: str, devices: int = 1, only: dict[int, tuple[str, ...]] | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = xla.of_command(*xla.QUICK, f"{xla.DEVICES}{devices}")
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        self.files = [folder / f"said.{i}" for i in range(count)]
        self.each = []
        for i, file in enumerate(self.files):
            own = (f"--coordinator={address}", f"--processes={count}", f"--process={i}") if count > 1 else ()
            own += (only or {}).get(i, ())
            with open(file, "w") as said:
                self.each.append(
                    subprocess.Popen([sys.executable, *command, *own], cwd=ROOT, env=environment, stdout=said, stderr=said)
                )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_) -> None:
        for process in self.each:
            process.kill()
            process.wait()

    def codes(self, seconds: float) -> list[int]:
        return [process.wait(seconds) for process in self.each]

    def said(self, i: int) -> str:
        return self.files[i].read_text()


def learnt(workdir: Path, step: int):
    """The parameters of a run after so many RL steps, from whatever devices, on one."""
    folder = workdir.absolute() / "checkpoints" / str(step) / "state"
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), stored)
        return jax.tree.map(np.asarray, checkpointer.restore(folder, like)["params"])


def apart(a, b) -> float:
    """The largest difference of two parameters."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))
