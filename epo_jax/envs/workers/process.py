"""The host's end of a worker process: pipes, open requests, deadlines, termination."""

import collections
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from epo_jax.common import stopping
from epo_jax.common.files import child_environment
from epo_jax.envs.workers import worker as program

MAX_ANSWER_BYTES = 1 << 24
GRACE_SECONDS = 2.0
BEATS_PER_SILENCE = 10  # heartbeats per `Deadlines.silence`
SINGLE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")}


class Deadlines(NamedTuple):
    """Seconds that a worker may take.

    Attributes:
        start: additional time for the first answer of a process (imports, a JVM).
        reset: for a reset.
        step: for one step.
        silence: between two heartbeats while it works; detects a process that is stopped or starved.
    """

    start: float = 180.0
    reset: float = 60.0
    step: float = 60.0
    silence: float = 30.0


class Request(NamedTuple):
    """A request to a worker: `about` belongs to the caller, `seconds` is the time limit once it is at the head of the queue."""

    id: int
    about: Any
    seconds: float


class WorkerFailed(Exception):
    """The worker must be replaced; the message is the reason."""


class WorkerProcess:
    """One worker process. It answers requests in order, so it is working on the head of `queue`.

    Attributes:
        queue: requests without an answer.
        answers: number of answers of this process.
        memory_mb: resident memory of the process at its last answer.
    """

    def __init__(
        self,
        module: str,
        options: dict[str, Any],
        deadlines: Deadlines,
        memory_limit_mb: int,
        selector: selectors.BaseSelector,
    ):
        self._command = [sys.executable, "-m", program.__name__, module]
        beat = deadlines.silence / BEATS_PER_SILENCE
        self._hello = json.dumps({"options": options, "beat": beat, "memory_limit_mb": memory_limit_mb}).encode() + b"\n"
        self._deadlines = deadlines
        self._selector = selector
        self._last_id = 0
        self.start()

    def start(self) -> None:
        """Starts the process, or a new one after `end`."""
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            bufsize=0,
            start_new_session=True,
            env=child_environment(**SINGLE_THREAD),
        )
        stopping.process_groups.add(self.process.pid)
        os.set_blocking(self.process.stdin.fileno(), False)
        os.set_blocking(self.process.stdout.fileno(), False)
        self._selector.register(self.process.stdout, selectors.EVENT_READ, self)
        self.queue: collections.deque[Request] = collections.deque()
        self.answers = self.memory_mb = 0
        self._incoming = bytearray()
        self._outgoing = bytearray(self._hello)
        self._writing = False
        self._heard = False
        self._head_since = self._last_heard = time.monotonic()

    def submit(self, about: Any, seconds: float, message: dict[str, Any]) -> None:
        """Sends a request; `read` returns it with its answer."""
        if not self.queue:
            self._head_since = time.monotonic()
        self._last_id += 1
        self.queue.append(Request(self._last_id, about, seconds))
        self._outgoing += json.dumps({"id": self._last_id, **message}).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Writes as much as the pipe takes; the selector reports when it takes more. `read` reports a broken pipe."""
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

    def read(self) -> list[tuple[Request, dict[str, Any]]]:
        """Returns requests with new answers. Raises WorkerFailed at the end of the file or for a malformed answer."""
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
        self._last_heard, self._heard = time.monotonic(), True
        answers = []
        while (end := self._incoming.find(b"\n")) >= 0:
            line = bytes(self._incoming[:end])
            del self._incoming[: end + 1]
            if line != program.BEAT:
                answers.append(self._match(line))
        if len(self._incoming) > MAX_ANSWER_BYTES:
            raise WorkerFailed("its answer has no end")
        if ended and not answers:
            raise WorkerFailed("its process ended")
        return answers

    def _match(self, line: bytes) -> tuple[Request, dict[str, Any]]:
        try:
            answer = json.loads(line)
            if not self.queue or answer["id"] != self.queue[0].id:
                raise ValueError
            self.memory_mb = int(answer["memory_mb"])
        except (ValueError, KeyError, TypeError):
            raise WorkerFailed(f"it answered {line[:80]!r}") from None
        self.answers += 1
        self._head_since = time.monotonic()
        return self.queue.popleft(), answer

    def seconds_left(self) -> tuple[float, str]:
        """Returns the seconds until the worker must be replaced, and the reason; infinity without open requests."""
        if not self.queue:
            return float("inf"), ""
        now = time.monotonic()
        seconds = self.queue[0].seconds
        deadline = self._head_since + seconds + (0.0 if self.answers else self._deadlines.start) - now
        silence = max(self._head_since, self._last_heard) + self._deadlines.silence - now
        if self._heard and silence < deadline:
            return silence, f"it gave no sign of life for {self._deadlines.silence:g} seconds"
        return deadline, f"it gave no answer within {seconds:g} seconds"

    def last_words(self) -> str:
        """Returns the last line that the worker wrote to standard error."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - 4096))
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def end(self) -> None:
        """Kills the worker and its children, and reaps it. May be called twice."""
        if self.process.stdout.closed:
            return
        self._close_input()
        self._selector.unregister(self.process.stdout)
        try:  # not reaped yet, so no other process group can have this id
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        stopping.process_groups.discard(self.process.pid)
        self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def _close_input(self) -> None:
        if self._writing:
            self._selector.unregister(self.process.stdin)
            self._writing = False
        self.process.stdin.close()

    def _has_left(self) -> bool:
        """Whether the worker has closed its output, as it does when it exits."""
        try:
            return not os.read(self.process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return False


def end_all(workers: Iterable[WorkerProcess]) -> None:
    """Ends workers; idle ones first have `GRACE_SECONDS` to run their exit handlers."""
    workers = list(workers)
    idle = [worker for worker in workers if not worker.queue and not worker.process.stdout.closed]
    for worker in idle:
        worker._close_input()
    until = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < until and not all(worker._has_left() for worker in idle):
        time.sleep(0.002)
    for worker in workers:
        worker.end()
