"""A worker process: several episodes of one environment behind JSON lines on its standard input and output.

Started by `epo_jax.envs.pool` as `python -m epo_jax.envs.worker MODULE`. The first line holds the options; every other
line is one request, answered by one line in the same order:

    {"id": 7, "op": "play", "slot": 3, "task": {...}, "actions": [...]}   reset, then every action; the last observation
    {"id": 8, "op": "step", "slot": 3, "action": "go to shelf 1"}         one step
    {"id": 9, "op": "release", "slot": 3}                                 forget the episode and its environment

    {"id": 7, "observation": {...}}   {"id": 9, "observation": null}
    {"id": 7, "user_error": "..."}    the input is bad: goes to the person, the worker lives on
    {"id": 7, "error": "..."}         anything else: the worker's state is not to be trusted, so it ends after saying so

The process ends, and everything it started with it, when its input closes or its parent is gone.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any, BinaryIO

from epo_jax.errors import UserError

ORPHAN_CHECK_SECONDS = 5.0


def _answer(out: BinaryIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message).encode() + b"\n")
    out.flush()


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


def _handle(
    request: dict[str, Any], envs: dict[int, Any], module: Any, options: dict[str, Any]
) -> dict[str, Any] | None:
    slot = request["slot"]
    if request["op"] == "release":
        envs.pop(slot, None)
        return None
    if request["op"] == "step":
        return vars(envs[slot].step(request["action"]))
    if slot not in envs:
        envs[slot] = module.make_env(options)
    observation = envs[slot].reset(request["task"])
    for action in request["actions"]:
        observation = envs[slot].step(action)
    return vars(observation)


def main(module_name: str) -> None:
    requests, answers = _protocol_streams()
    _watch_parent()
    options = json.loads(requests.readline() or b"{}")
    module = None
    envs: dict[int, Any] = {}
    for line in requests:
        request = json.loads(line)
        try:
            module = module or importlib.import_module(module_name)
            _answer(answers, {"id": request["id"], "observation": _handle(request, envs, module, options)})
        except UserError as error:
            _answer(answers, {"id": request["id"], "user_error": str(error)})
        except BaseException as error:  # environments have been seen to raise SystemExit on a malformed game
            traceback.print_exc()
            sys.stderr.flush()
            _answer(answers, {"id": request["id"], "error": f"{type(error).__name__}: {error}"})
            break
    _end_with_children(0)


if __name__ == "__main__":
    main(sys.argv[1])
