"""Trains many runs at once: the members of a sweep.

Members differ in coefficients and seeds, and share one compiled program.

    epo-jax sweep sweeps/first --config=ablation:laptop

`--config.sweep.arms`, `.seeds` and `.over` define the members (epo_jax/training/grid.py). Each member has the run folder
WORKDIR/members/NAME, as `epo_jax.main` would have written it; WORKDIR/sweep.json lists the members with their coefficients, and
WORKDIR/warm_start/seedN keeps the policy that the members of a seed begin with. Methods that need another program are trained one
after the other. `epo_jax/training/sweep.py` prepares the sweep, `epo_jax/training/loop.py` is its loop.
"""

import re
import sys

from absl import flags

from epo_jax.command import parse, run
from epo_jax.common import compilation
from epo_jax.common.errors import UserError
from epo_jax.common.stopping import StopRequest
from epo_jax.parallel import hosts
from epo_jax.parallel.mesh import devices_in_use
from epo_jax.runs import lock, profiling
from epo_jax.runs.folder import Command
from epo_jax.training import dry_run
from epo_jax.training.grid import programs, refuse_static
from epo_jax.training.sweep import train


def main(argv: list[str]) -> None:
    for argument in argv:
        if match := re.match(r"--?config\.sweep\.over\.([^=]+)", argument):
            refuse_static(match[1])
    command = parse(argv, define_flags, sweep=True)
    if command.flags.dry_run:
        show(command)
        return
    for name in ("coordinator", "processes", "process"):
        if command.flags[name].value is not None:
            raise UserError(
                f"--{name}: a sweep runs on one host, over whose devices its members are spread (config.sweep.devices); leave it "
                "out."
            )
    with StopRequest(command.workdir) as stop, lock.hold(command.workdir):
        print(devices_in_use(), flush=True)
        compilation.keep_programs()
        train(command, stop)


def define_flags(values: flags.FlagValues) -> None:
    hosts.define_flags(values)
    profiling.define_flag(values)
    dry_run.define_flag(values)


def show(command: Command) -> None:
    """Prints what the sweep would need; `--dry_run`. Its members need about the same, so one of them stands for all."""
    print(devices_in_use(), flush=True)
    compilation.keep_programs()
    groups = programs(command.config)
    for number, members in enumerate(groups, start=1):
        print(f"program {number} of {len(groups)}, {len(members)} members: {', '.join(member.name for member in members)}")
    print(f"one member, {groups[0][0].name}:", flush=True)
    for line in dry_run.describe(groups[0][0].config):
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
