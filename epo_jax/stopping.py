"""A run that is asked to stop, by Ctrl-C or whoever needs the machine, ends at a point from which it can go on exactly."""

import os
import signal

import jax

TOLD = b"asked to stop: what is going on will be finished and saved; ask again to end at once\n"


class StopRequest:
    """`asked` becomes True with the first SIGTERM or SIGINT inside `with`; a second one ends the process on the spot.

    Where `jax.distributed` is initialised it leaves the signals alone: its preemption service listens to them, and finds a
    step that all processes can stop after (`CheckpointManager.reached_preemption`).
    """

    def __init__(self):
        self.asked = False
        self._before = {}

    def __enter__(self) -> "StopRequest":
        if not jax.distributed.is_initialized():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_) -> None:
        self.asked = True
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)
        os.write(2, TOLD)  # print could be in the middle of a line
