"""A worker process: several episodes of one environment behind JSON lines on its standard input and output.

`epo_jax.envs.workers.process` starts it as `python -m epo_jax.envs.workers.worker MODULE`. The first line holds the
environment's options, the seconds between heartbeats and the memory it may use. Every other line is one request, answered by
one line in the same order. A seat is one environment object, made when it is first used and used again for later episodes.

    {"id": 7, "op": "play", "seat": 3, "task": {...}, "actions": [...]}   reset, then every action; the last observation
    {"id": 8, "op": "step", "seat": 3, "action": "go to shelf 1"}         one step

    {"id": 7, "memory_mb": 71, "observation": {...}}
    {"id": 7, "memory_mb": 71, "user_error": "..."}   the input is bad: goes to the person, the worker lives on
    {"id": 7, "memory_mb": 71, "error": "..."}        anything else: the worker's state is not to be trusted, so it ends
    {"beat": true}                                    a sign of life while a request is being worked on

When its input closes, the process runs its exit handlers and ends; when its parent is gone, at once. Everything it started
goes with it.
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
    """The answering side of the protocol, shared by the worker and its heartbeat."""

    def __init__(self, out: BinaryIO, beat_seconds: float):
        self._out = out
        self._lock = threading.Lock()
        self._working = threading.Event()
        threading.Thread(target=self._beat, args=(beat_seconds,), daemon=True).start()

    def begin(self) -> None:
        """A request is being worked on from here until its answer."""
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
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) // _PAGES_PER_MB
    except OSError:
        return 0


def _limit_memory(size: int) -> None:
    """Beyond `size` bytes of its own, allocations of this process, and of each that it starts, fail."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (size if most == resource.RLIM_INFINITY else min(size, most), most))


def _end_with_children(code: int) -> None:
    """Ends this process at once. As the leader of its session it takes its process group (a JVM, say) along."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(code)


def _watch_parent() -> None:
    """A worker stuck inside an environment does not see its input close; a timer sees that its parent has changed."""
    parent = os.getppid()

    def check(signum, frame):
        if os.getppid() != parent:
            _end_with_children(1)

    signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, ORPHAN_CHECK_SECONDS, ORPHAN_CHECK_SECONDS)


def _protocol_streams() -> tuple[BinaryIO, BinaryIO]:
    """Keeps the protocol on private descriptors; whatever the environment prints then goes to standard error."""
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
        except BaseException as error:  # environments have been seen to raise SystemExit on a malformed game
            traceback.print_exc()
            sys.stderr.flush()
            answers.send({"id": request["id"], "error": f"{type(error).__name__}: {error}"})
            _end_with_children(1)


if __name__ == "__main__":
    main(sys.argv[1])
