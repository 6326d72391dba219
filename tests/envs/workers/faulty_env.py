"""An environment that misbehaves on demand, for the pool's tests. Its observations depend on every action so far."""

import atexit
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from epo_jax.common.errors import UserError
from epo_jax.envs.base import Observation

COUNTER = {"steps": 0}


def trace(task_id, actions):
    """The observations of an episode without faults."""
    digests, seen = hashlib.sha256(task_id.encode()), []
    for action in ("", *actions):
        digests.update(action.encode() + b"|")
        seen.append(digests.hexdigest())
    return seen


class FaultyEnv:
    def __init__(self, options):
        self._marker = Path(options["marker"])

    def reset(self, task):
        self._id, self._actions = task["id"], []
        if task["id"] == "refused":
            raise UserError("the file of this task is broken; make it again.")
        if task["id"] == "endless":
            while True:
                pass
        return Observation(text=trace(self._id, [])[-1], goal="go on")

    def step(self, action):
        print("this must not reach the protocol")
        COUNTER["steps"] += 1
        self._actions.append(action)
        fault, _, when = action.partition(" ")
        first = not self._marker.exists()
        if fault in FAULTS and (first or when == "always"):
            self._marker.touch()
            FAULTS[fault]()
        if action == "slow":
            time.sleep(1.5)
        if action == "grow":
            COUNTER["hoard"] = bytearray(150 << 20)
        if action == "child":
            child = subprocess.Popen(["sleep", "1000"])
            Path(f"{self._marker}.children").write_text(str(child.pid))
            atexit.register(Path(f"{self._marker}.left").touch)
        if action == "modules":
            return Observation(text=" ".join(sorted(sys.modules)))
        if action == "threads":
            return Observation(text=os.environ.get("OMP_NUM_THREADS", ""))
        if action == "count":
            return Observation(text=str(COUNTER["steps"]))
        if action == "malformed" and first:
            self._marker.touch()
            return Observation(text=5)
        return Observation(text=trace(self._id, self._actions)[-1], goal="go on", done=action == "end")


def _rubbish():
    for descriptor in range(3, 12):  # the protocol's own is among them
        try:
            os.write(descriptor, b"no json at all\n")
        except OSError:
            pass


def _raise(error):
    raise error


def _exhaust():
    hoard = []
    while True:
        hoard.append(bytearray(16 << 20))


FAULTS = {
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exhaust": _exhaust,
    "die": lambda: os.kill(os.getpid(), 9),
    "hang": lambda: time.sleep(1000),
    "rubbish": _rubbish,
    "exception": lambda: _raise(KeyError("inside the game")),
    "leave": lambda: sys.exit(3),
}


def list_tasks(split, options):
    return [{"id": "a", "type": "x"}]


def make_env(options):
    return FaultyEnv(options)
