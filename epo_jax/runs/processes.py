"""processes.jsonl: one row for each process that trained in a run folder."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import jax

from epo_jax.common.files import append
from epo_jax.parallel import mesh


def record(workdir: Path, step: int, parameters: int, arguments: Sequence[str]) -> None:
    """Adds a row for this process.

    Args:
        step: RL steps taken before it.
        parameters: numbers that RL trains.
        arguments: the options on its command line.
    """
    row = {"step": step, "device": mesh.describe(jax.devices()), "parameters": parameters, "arguments": shlex.join(arguments)}
    append(workdir / "processes.jsonl", json.dumps(row) + "\n")
