"""Trains an agent with EPO.

    epo-jax train runs/alfworld --config=alfworld:laptop

`epo_jax/training/run.py` prepares the run, `epo_jax/training/loop.py` is its loop.
"""

import contextlib
import sys

from absl import flags

from epo_jax.command import parse, run
from epo_jax.common import compilation
from epo_jax.common.stopping import StopRequest
from epo_jax.parallel import hosts
from epo_jax.parallel.mesh import devices_in_use
from epo_jax.runs import lock, profiling
from epo_jax.runs.folder import Command
from epo_jax.training import dry_run
from epo_jax.training.run import train, written


def main(argv: list[str]) -> None:
    command = parse(argv, define_flags)
    if command.flags.dry_run:
        show(command)
        return
    with (
        StopRequest(command.workdir) as stop,
        hosts.joined(command.flags),
        lock.hold(*written(command.config, command.workdir)) if hosts.is_first() else contextlib.nullcontext(),
    ):
        compilation.keep_programs()
        train(command, stop)


def define_flags(values: flags.FlagValues) -> None:
    hosts.define_flags(values)
    profiling.define_flag(values)
    dry_run.define_flag(values)


def show(command: Command) -> None:
    """Prints what the run would need; `--dry_run`."""
    print(devices_in_use(), flush=True)
    compilation.keep_programs()
    for line in dry_run.describe(command.config):
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
