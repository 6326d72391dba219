"""The command `epo-jax`, also `python -m epo_jax`.

    epo-jax train --config=alfworld:laptop

`epo-jax NAME OPTIONS` is `python -m MODULE OPTIONS`, with the modules of `COMMANDS`. `epo-jax NAME --help` lists the options.
"""

import importlib
import os
import sys

from epo_jax.common.errors import UserError, nearest

# Command: (module, what it does).
COMMANDS = {
    "train": ("epo_jax.main", "trains an agent"),
    "sweep": ("epo_jax.sweep", "trains many agents at once, which differ in coefficients, methods and seeds"),
    "evaluate": ("epo_jax.evaluate", "measures the success of a run or a published model on fixed games"),
    "generate": ("epo_jax.generate", "shows an agent at play, lets you act in its place, or answers a prompt"),
    "export": ("epo_jax.export", "writes a run's policy as a model folder for transformers and vLLM"),
    "report": ("epo_jax.report", "compares runs in one HTML file"),
    "figures": ("epo_jax.figures", "draws the curves of a run, or a comparison of runs"),
    "play": ("epo_jax.envs.play", "plays an environment in the terminal"),
}


def main() -> int:
    """Runs the command that `sys.argv` names; returns the exit code (`command.run`)."""
    from epo_jax.command import run  # takes a moment, as it imports JAX

    if os.getcwd() not in sys.path:  # an environment of one's own is imported from here, as `python -m` does
        sys.path.insert(0, os.getcwd())
    return run(dispatch)


def dispatch(argv: list[str]) -> None:
    """Calls the `main` of a command's module with the arguments after its name.

    Raises:
        UserError: there is no such command.
    """
    name, rest = (argv[1], argv[2:]) if len(argv) > 1 else ("--help", [])
    if name in ("--help", "-h", "help"):
        print(usage())
        return
    if name not in COMMANDS:
        raise UserError(f"epo-jax has no command {name!r}{nearest(name, COMMANDS)}; choose one of {', '.join(COMMANDS)}.")
    importlib.import_module(COMMANDS[name][0]).main([f"epo-jax {name}", *rest])


def usage() -> str:
    """What `epo-jax --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  epo-jax {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["Trains language-model agents in text games by reinforcement learning.", "", *lines, "",
                      "epo-jax COMMAND --help lists the options of a command."])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
