"""Episodes in worker processes: submit resets and steps by slot, collect observations in whatever order they come.

A worker that dies, answers rubbish or overruns its deadline is killed with everything it started and replaced; its live
episodes are played again from their recorded actions (environments are deterministic) and go on as if nothing had
happened. One host thread drives all of it through a selector.
"""

import collections
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple

from epo_jax.envs import base
from epo_jax.envs.base import Observation, Task
from epo_jax.errors import UserError

FAILURES_ALLOWED = 3
MAX_ANSWER_BYTES = 1 << 24
SINGLE_THREAD = {
    name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
}


class Deadlines(NamedTuple):
    """Seconds a worker may take: for its first answer (imports, a JVM), for a reset, for one step."""

    start: float = 180.0
    reset: float = 60.0
    step: float = 60.0


DEADLINES = Deadlines()


@dataclasses.dataclass
class _Episode:
    """A slot's record: what is needed to play it again, and what the caller still waits for."""

    worker: "_Worker"
    task: Task
    actions: list[str] = dataclasses.field(default_factory=list)
    last: Observation | None = None  # delivered after `actions` (without the pending one)
    pending: str = ""  # "", "reset" or "step"; a pending step is the last of `actions`
    failures: int = 0


class _Request(NamedTuple):
    id: int
    slot: int
    kind: str  # "reset", "step" (the caller waits for these), "replay", "release"
    seconds: float


class _WorkerFailed(Exception):
    """The worker can not go on; the message says why."""


class _Worker:
    """One process and its pipes. Its requests are answered in order, so only the head of `queue` is being worked on."""

    def __init__(self, module_name: str, options: dict[str, Any], selector: selectors.BaseSelector):
        self._command = [sys.executable, "-m", "epo_jax.envs.worker", module_name]
        self._hello = json.dumps(options).encode() + b"\n"
        self._selector = selector
        self.slots: set[int] = set()
        self.answered = False
        self.start()

    def start(self) -> None:
        root = str(Path(base.__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, **SINGLE_THREAD, "PYTHONPATH": path},
        )
        os.set_blocking(self.process.stdin.fileno(), False)
        os.set_blocking(self.process.stdout.fileno(), False)
        self._selector.register(self.process.stdout, selectors.EVENT_READ, self)
        self.queue: collections.deque[_Request] = collections.deque()
        self._incoming = bytearray()
        self._outgoing = bytearray(self._hello)
        self._writing = False
        self.answered = False
        self.head_since = time.monotonic()

    def submit(self, request: _Request, message: dict[str, Any]) -> None:
        if not self.queue:
            self.head_since = time.monotonic()
        self.queue.append(request)
        self._outgoing += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Writes what the pipe takes; the selector says when it takes more. A broken pipe shows on the reading side."""
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self.process.stdin.fileno(), self._outgoing[:65536])]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._outgoing.clear()
        if bool(self._outgoing) != self._writing:
            self._writing = bool(self._outgoing)
            if self._writing:
                self._selector.register(self.process.stdin, selectors.EVENT_WRITE, self)
            else:
                self._selector.unregister(self.process.stdin)

    def read(self) -> list[tuple[_Request, dict[str, Any]]]:
        """Newly answered requests with their answers. Raises _WorkerFailed on end of file or rubbish."""
        ended = False
        while True:
            try:
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                break
            if not chunk:
                ended = True
                break
            self._incoming += chunk
            if len(chunk) < 1 << 16:
                break
        answers = []
        while (end := self._incoming.find(b"\n")) >= 0:
            line = bytes(self._incoming[:end])
            del self._incoming[: end + 1]
            answers.append(self._match(line))
        if len(self._incoming) > MAX_ANSWER_BYTES:
            raise _WorkerFailed("its answer has no end")
        if ended and not answers:
            raise _WorkerFailed("its process ended")
        return answers

    def _match(self, line: bytes) -> tuple[_Request, dict[str, Any]]:
        try:
            answer = json.loads(line)
            if not self.queue or answer["id"] != self.queue[0].id:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise _WorkerFailed(f"it answered {line[:80]!r}") from None
        self.answered = True
        self.head_since = time.monotonic()
        return self.queue.popleft(), answer

    def seconds_left(self, start_seconds: float) -> float:
        """Until the head request's deadline; infinite when the worker owes nothing."""
        if not self.queue:
            return float("inf")
        limit = self.queue[0].seconds + (0.0 if self.answered else start_seconds)
        return self.head_since + limit - time.monotonic()

    def last_words(self) -> str:
        """The last line the worker wrote to standard error."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - 4096))
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def end(self) -> None:
        """Kills the worker with everything it started, and reaps it. Safe to call twice."""
        if self.process.stdin.closed:
            return
        self._selector.unregister(self.process.stdout)
        if self._writing:
            self._selector.unregister(self.process.stdin)
            self._writing = False
        self.process.stdin.close()
        try:  # not reaped yet, so the process group's id can not have passed to a stranger
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


def _end_all(workers: dict[int, _Worker]) -> None:
    for worker in workers.values():
        worker.end()


def _observation(fields: Any) -> Observation:
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise _WorkerFailed(f"it answered {str(fields)[:80]!r} for an observation")
    try:
        return Observation(**{**fields, **{name: tuple(fields.get(name, ())) for name in ("admissible", "objects")}})
    except TypeError as error:
        raise _WorkerFailed(f"its observation is malformed ({error})") from None


class EnvPool:
    """Episodes of environment `name` on up to `workers` processes, started as slots first need them.

    An environment module may set `SLOTS_PER_WORKER`, the most episodes one of its processes can hold; the pool then
    starts more processes than `workers` where the slots need them.

    Attributes:
        workers: processes wanted; slot s lives on number s % workers, so callers can keep episodes together.
        restarts: workers that were replaced after a fault.
    """

    def __init__(self, name: str, options: dict[str, Any], workers: int, deadlines: Deadlines = DEADLINES):
        module = base.environment(name)
        self._module_name = module.__name__
        self._slots_per_worker = getattr(module, "SLOTS_PER_WORKER", None)
        self._options = options
        self.workers = max(1, workers)
        self._deadlines = deadlines
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Worker] = {}
        self._home: dict[int, _Worker] = {}  # where a slot lives; kept after release, so a slot never moves
        self._episodes: dict[int, _Episode] = {}
        self._ready: collections.deque[tuple[int, Observation | UserError]] = collections.deque()
        self._next_id = 0
        self.restarts = 0
        self._finalizer = weakref.finalize(self, _end_all, self._workers)

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def reset(self, slot: int, task: Task) -> None:
        """Starts an episode of `task` in `slot`, dropping the one that was there. `get` brings what it sees first."""
        self._check_free(slot)
        episode = _Episode(worker=self._worker_of(slot), task=task, pending="reset")
        self._episodes[slot] = episode
        self._send_play(slot, episode, "reset")

    def step(self, slot: int, action: str) -> None:
        """Acts in `slot`'s episode; the observation comes from `get`."""
        self._check_free(slot)
        episode = self._episodes.get(slot)
        if episode is None or episode.last is None or episode.last.done:
            raise ValueError(f"slot {slot} has no episode to act in; reset it first")
        episode.actions.append(action)
        episode.pending = "step"
        self._send_step(slot, episode)

    def get(self, timeout: float | None = None) -> tuple[int, Observation]:
        """The next finished slot and what it saw.

        Raises:
            TimeoutError: nothing finished within `timeout` seconds.
            UserError: the environment refused its input, or a task ended its worker several times in a row.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self._ready:
            if not any(episode.pending for episode in self._episodes.values()):
                raise ValueError("no reset or step is under way, so there is nothing to wait for")
            left = None if until is None else until - time.monotonic()
            self._wait(left)
            if not self._ready and until is not None and time.monotonic() >= until:
                raise TimeoutError(f"no environment answered within {timeout:g} seconds")
        slot, outcome = self._ready.popleft()
        if isinstance(outcome, UserError):
            raise outcome
        return slot, outcome

    def release(self, slot: int) -> None:
        """Forgets `slot`'s episode and frees its environment."""
        self._check_free(slot)
        if self._episodes.pop(slot, None) is not None:
            self._submit(self._home[slot], slot, "release", self._deadlines.reset, {"op": "release", "slot": slot})

    def close(self) -> None:
        """Kills all workers and whatever they started."""
        _end_all(self._workers)
        self._workers.clear()
        self._episodes.clear()
        self._home.clear()
        self._selector.close()
        self._finalizer.detach()

    def _check_free(self, slot: int) -> None:
        if slot in self._episodes and self._episodes[slot].pending:
            raise ValueError(f"slot {slot} is still busy with its last request")

    def _worker_of(self, slot: int) -> _Worker:
        """The process that holds `slot`: number `slot % workers`, or the next one with room where that one is full."""
        if slot not in self._home:
            place = slot % self.workers
            room = self._slots_per_worker or sys.maxsize
            while place in self._workers and len(self._workers[place].slots) >= room:
                place += 1
            if place not in self._workers:
                self._workers[place] = _Worker(self._module_name, self._options, self._selector)
            self._workers[place].slots.add(slot)
            self._home[slot] = self._workers[place]
        return self._home[slot]

    def _submit(self, worker: _Worker, slot: int, kind: str, seconds: float, message: dict[str, Any]) -> None:
        self._next_id += 1
        worker.submit(_Request(self._next_id, slot, kind, seconds), {"id": self._next_id, **message})

    def _send_play(self, slot: int, episode: _Episode, kind: str, actions: tuple[str, ...] = ()) -> None:
        seconds = self._deadlines.reset + len(actions) * self._deadlines.step
        message = {"op": "play", "slot": slot, "task": episode.task, "actions": actions}
        self._submit(episode.worker, slot, kind, seconds, message)

    def _send_step(self, slot: int, episode: _Episode) -> None:
        message = {"op": "step", "slot": slot, "action": episode.actions[-1]}
        self._submit(episode.worker, slot, "step", self._deadlines.step, message)

    def _wait(self, seconds: float | None) -> None:
        """Handles one round of answers, or the first deadline that passes, or returns after `seconds`."""
        # Answers that already lie in the pipes come before deadlines: the host may have been busy for minutes.
        deadline = min(
            (worker.seconds_left(self._deadlines.start) for worker in self._workers.values()), default=float("inf")
        )
        limit = max(0.0, min(deadline, float("inf") if seconds is None else seconds))
        events = self._selector.select(None if limit == float("inf") else limit)
        for key, mask in events:
            worker: _Worker = key.data
            if key.fileobj.closed:  # a worker replaced earlier in this round
                continue
            if mask & selectors.EVENT_WRITE:
                worker.flush()
                continue
            try:
                for request, answer in worker.read():
                    self._handle(worker, request, answer)
            except _WorkerFailed as failure:
                self._replace(worker, str(failure))
        if not events:
            for worker in self._workers.values():
                if worker.seconds_left(self._deadlines.start) <= 0:
                    self._replace(worker, f"it gave no answer within {worker.queue[0].seconds:g} seconds")

    def _handle(self, worker: _Worker, request: _Request, answer: dict[str, Any]) -> None:
        if request.kind == "release":
            return
        episode = self._episodes[request.slot]
        try:
            if "user_error" in answer:
                del self._episodes[request.slot]
                self._ready.append((request.slot, UserError(answer["user_error"])))
                return
            if "observation" not in answer:
                raise _WorkerFailed(f"its environment raised {answer.get('error')}")
            observation = _observation(answer["observation"])
            if request.kind == "replay":
                if observation != episode.last:
                    raise _WorkerFailed("the episode came out differently when it was played again")
                return
        except _WorkerFailed:
            worker.queue.appendleft(request)  # the culprit stays at the head, where _replace looks for it
            raise
        episode.last = observation
        episode.pending = ""
        episode.failures = 0
        self._ready.append((request.slot, observation))

    def _replace(self, worker: _Worker, reason: str) -> None:
        """Kills and restarts a failed worker and plays its live episodes again."""
        words = worker.last_words()
        slot = worker.queue[0].slot if worker.queue else None
        worker.end()
        self.restarts += 1
        culprit = self._episodes.get(slot)
        if culprit is not None:
            culprit.failures += 1
        if culprit is not None and culprit.failures >= FAILURES_ALLOWED:
            said = f" and last wrote {words!r}" if words else ""
            message = (
                f"the environment worker failed {culprit.failures} times in a row on task {culprit.task['id']!r}: "
                f"{reason}{said}; leave this task out or mend its files."
            )
            del self._episodes[slot]
            self._ready.append((slot, UserError(message)))
        worker.start()
        for slot in sorted(worker.slots):
            episode = self._episodes.get(slot)
            if episode is None:
                continue
            if episode.pending == "reset":
                self._send_play(slot, episode, "reset")
            elif episode.pending == "step":
                self._send_play(slot, episode, "replay", tuple(episode.actions[:-1]))
                self._send_step(slot, episode)
            elif episode.last is not None and not episode.last.done:
                self._send_play(slot, episode, "replay", tuple(episode.actions))
