"""A worker process: several episodes of one environment, driven by JSON lines on its standard input and output.

`epo_jax.envs.workers.process` starts it as `python -m epo_jax.envs.workers.worker MODULE`. The first line contains the
environment's options, the seconds between heartbeats and the memory limit. Every other line is a request; answers come in the
same order, one line each. A seat is one environment object, created at its first use and reused by later episodes.

    {"id": 7, "op": "play", "seat": 3, "task": {...}, "actions": [...]}   reset, then every action; the last observation
    {"id": 8, "op": "step", "seat": 3, "action": "go to shelf 1"}         one step

    {"id": 7, "memory_mb": 71, "observation": {...}}
    {"id": 7, "memory_mb": 71, "user_error": "..."}   bad input: the host raises UserError, the worker goes on
    {"id": 7, "memory_mb": 71, "error": "..."}        any other error: the state of the worker is undefined, so it exits
    {"beat": true}                                    heartbeat while a request is being processed

If its input closes, the process runs its exit handlers and exits; if its parent dies, it exits at once. Both kill all processes
that it started.
"""

import atexit
import importlib
import json
import os
import resource
import signal
import sys
import threading
import traceback
from typing import Any, BinaryIO

from epo_jax.common.errors import UserError

BEAT = b'{"beat": true}'
ORPHAN_CHECK_SECONDS = 5.0
_PAGES_PER_MB = (1 << 20) // resource.getpagesize()


class _Answers:
    """Writes answers and heartbeats, from two threads."""

    def __init__(self, out: BinaryIO, beat_seconds: float):
        self._out = out
        self._lock = threading.Lock()
        self._working = threading.Event()
        threading.Thread(target=self._beat, args=(beat_seconds,), daemon=True).start()

    def begin(self) -> None:
        """Starts the heartbeat, which `send` stops."""
        self._working.set()

    def send(self, answer: dict[str, Any]) -> None:
        self._working.clear()
        self._write(json.dumps({**answer, "memory_mb": _memory_mb()}).encode())

    def _write(self, line: bytes) -> None:
        with self._lock:
            self._out.write(line + b"\n")
            self._out.flush()

    def _beat(self, seconds: float) -> None:
        pause = threading.Event()
        while True:
            self._working.wait()
            pause.wait(seconds)
            if self._working.is_set():
                self._write(BEAT)


def _memory_mb() -> int:
    """Resident memory of this process; 0 without /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) // _PAGES_PER_MB
    except OSError:
        return 0


def _limit_memory(size: int) -> None:
    """Limits the data segment of this process, and of each of its children, to `size` bytes."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (size if most == resource.RLIM_INFINITY else min(size, most), most))


def _end_with_children(code: int) -> None:
    """Exits at once; as the leader of its session, kills its process group first (a JVM, for example)."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(code)


def _watch_parent() -> None:
    """Exits if the parent dies, by a timer: a worker inside an environment does not read its input."""
    parent = os.getppid()

    def check(signum, frame):
        if os.getppid() != parent:
            _end_with_children(1)

    signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, ORPHAN_CHECK_SECONDS, ORPHAN_CHECK_SECONDS)


def _protocol_streams() -> tuple[BinaryIO, BinaryIO]:
    """Moves the protocol to private descriptors; output of the environment then goes to standard error."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, answers


def _handle(request: dict[str, Any], envs: dict[int, Any], module: Any, options: dict[str, Any]) -> dict[str, Any]:
    seat = request["seat"]
    if request["op"] == "step":
        return vars(envs[seat].step(request["action"]))
    if seat not in envs:
        envs[seat] = module.make_env(options)
    observation = envs[seat].reset(request["task"])
    for action in request["actions"]:
        observation = envs[seat].step(action)
    return vars(observation)


def main(module_name: str) -> None:
    requests, out = _protocol_streams()
    _watch_parent()
    atexit.register(_end_with_children, 0)  # the first handler, so the last to run
    hello = json.loads(requests.readline() or b'{"options": {}, "beat": 1, "memory_limit_mb": 1}')
    _limit_memory(hello["memory_limit_mb"] << 20)
    answers = _Answers(out, hello["beat"])
    module = None
    envs: dict[int, Any] = {}
    for line in requests:
        request = json.loads(line)
        answers.begin()
        try:
            module = module or importlib.import_module(module_name)
            answers.send({"id": request["id"], "observation": _handle(request, envs, module, hello["options"])})
        except UserError as error:
            answers.send({"id": request["id"], "user_error": str(error)})
        except BaseException as error:  # some environments raise SystemExit on a malformed game
            traceback.print_exc()
            sys.stderr.flush()
            answers.send({"id": request["id"], "error": f"{type(error).__name__}: {error}"})
            _end_with_children(1)


if __name__ == "__main__":
    main(sys.argv[1])
