"""The same run on one process and on several, all on this machine: their parameters must agree.

    python -m benchmarks.hosts                      # 1, 2 and 4 processes
    python -m benchmarks.hosts --processes 1 2 --config=alfworld:smoke --config.train.rows_tokens=1024

Other options go to epo_jax.main. Each number of processes trains two RL steps in its own folder, with processes on loopback and a
CPU device each. The output is the seconds and the largest difference of a parameter from the first run.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.processes import Processes, apart, learnt

# Adam divides by the size of a gradient, and so amplifies the rounding of one that is nearly 0.
OPTIONS = "--config.optim.lr=3e-4", "--config.warm_start.steps=3"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--config", default="tests/toy_sweep.py:single")
    chosen, options = parser.parse_known_args()
    first = None
    for count in chosen.processes:
        with tempfile.TemporaryDirectory() as name:
            folder, started = Path(name), time.perf_counter()
            command = ("-m", "epo_jax.main", f"--config={chosen.config}", f"--workdir={folder / 'run'}", "--config.train.steps=2")
            with Processes(count, folder, *command, *OPTIONS, *options) as running:
                if any(running.codes(3600)):
                    sys.exit(running.said(0))
            seconds, params = time.perf_counter() - started, learnt(folder / "run", 2)
        first = params if first is None else first
        print(f"{count} processes: {seconds:.0f} s, largest difference of a parameter {apart(params, first):.1e}", flush=True)


if __name__ == "__main__":
    main()
