"""Draws the curves of a run again.

    epo-jax figures runs/first

writes runs/first/figures/*.png from the run's metrics.jsonl and eval.jsonl.
"""

import sys
from pathlib import Path

from epo_jax.command import run
from epo_jax.common.errors import UserError
from epo_jax.runs import figures


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("name one run folder: epo-jax figures runs/first")
    for path in figures.draw(Path(argv[1])):
        print(path)


if __name__ == "__main__":
    sys.exit(run(main))
