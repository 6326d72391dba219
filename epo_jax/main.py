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
from epo_jax.runs import lock, profiling
from epo_jax.training.run import train, written


def main(argv: list[str]) -> None:
    command = parse(argv, define_flags)
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


if __name__ == "__main__":
    sys.exit(run(main))
