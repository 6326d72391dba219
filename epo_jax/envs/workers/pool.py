"""Episodes in worker processes: submit resets and steps by slot, collect observations in the order in which they arrive.

A worker that dies, sends a malformed answer, misses its deadline or stops sending heartbeats is killed with its children and
replaced. Its live episodes are replayed from their recorded actions (environments are deterministic) and go on unchanged. One
host thread drives all workers through a selector.
"""

import collections
import dataclasses
import itertools
import selectors
import sys
import time
import weakref
from typing import IO, Any, cast

from epo_jax.common.errors import UserError
from epo_jax.envs import base
from epo_jax.envs.base import Observation, Task
from epo_jax.envs.workers.process import Deadlines, Request, WorkerFailed, WorkerProcess, end_all

DEADLINES = Deadlines()
FAILURES_ALLOWED = 3
MEMORY_LIMIT_MB = 4096
RECYCLED_SHARE = 0.25  # of the memory limit; a larger worker is replaced by a new one
RECYCLED_ANSWERS = 1000  # but not before so many answers
SAME_TASK_BONUS = 8  # a worker that has loaded the task is chosen although it has up to so many episodes more


@dataclasses.dataclass(eq=False)
class _Episode:
    """A live episode: its actions, for a replay, and the pending request.

    Attributes:
        seat: the environment object in the worker.
        last: the observation after `actions` (without the pending one).
        pending: "", "reset" or "step"; a pending step is the last of `actions`.
    """

    worker: "_Worker"
    seat: int
    task: Task
    slot: int
    actions: list[str] = dataclasses.field(default_factory=list)
    last: Observation | None = None
    pending: str = "reset"
    failures: int = 0


class _Worker(WorkerProcess):
    """A worker process and its episodes; `seat` returns a free environment object."""

    def __init__(self, *args):
        super().__init__(*args)
        self.episodes: dict[int, _Episode] = {}  # by seat

    def seat(self) -> int:
        return next(seat for seat in itertools.count() if seat not in self.episodes)


def _observation(fields: Any) -> Observation:
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise WorkerFailed(f"it answered {str(fields)[:80]!r} for an observation")
    try:
        return base.from_fields(fields)
    except TypeError as error:
        raise WorkerFailed(f"its observation is malformed ({error})") from None


class EnvPool:
    """Episodes of environment `name` on up to `workers` processes, which start when episodes need them.

    A slot is any number that the caller chooses. Slots may be reset ahead of use: `get` returns their observation when it is
    ready. If an environment module sets `SLOTS_PER_WORKER`, the most episodes per process, the pool starts more than `workers`
    processes when it needs them. Episodes of the same task share a process unless it has many more episodes than the others.

    Attributes:
        workers: target number of processes.
        restarts: workers replaced after a fault.
        recycled: workers replaced because of their memory.
    """

    def __init__(
        self,
        name: str,
        options: dict[str, Any],
        workers: int,
        deadlines: Deadlines = DEADLINES,
        memory_limit_mb: int = MEMORY_LIMIT_MB,
    ):
        """`memory_limit_mb` limits each process of a worker; allocations beyond it fail, and the worker is replaced."""
        environment = base.environment(name)
        self._module = environment.module
        self._capacity = environment.slots_per_worker or sys.maxsize
        self._options = options
        self.workers = max(1, workers)
        self._deadlines = deadlines
        self._memory_limit_mb = memory_limit_mb
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._episodes: dict[int, _Episode] = {}  # by slot
        self._ready: collections.deque[tuple[int, Observation | UserError]] = collections.deque()
        self.restarts = 0
        self.recycled = 0
        self._finalizer = weakref.finalize(self, end_all, self._workers)

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def reset(self, slot: int, task: Task) -> None:
        """Starts an episode of `task` in `slot`, in place of the last one. `get` returns the first observation."""
        self.release(slot)
        worker = self._place(task)
        episode = _Episode(worker, worker.seat(), task, slot)
        self._episodes[slot] = worker.episodes[episode.seat] = episode
        self._send_play(episode)

    def step(self, slot: int, action: str) -> None:
        """Takes an action in the episode of `slot`; `get` returns the observation."""
        self._check_free(slot)
        episode = self._episodes.get(slot)
        if episode is None or episode.last.done:
            raise ValueError(f"slot {slot} has no episode to act in; reset it first")
        episode.actions.append(action)
        episode.pending = "step"
        self._send_step(episode)

    def get(self, timeout: float | None = None) -> tuple[int, Observation]:
        """Returns the next slot that is ready, and its observation.

        Raises:
            TimeoutError: no slot is ready within `timeout` seconds.
            UserError: the environment raised it, or the same task failed several workers in a row.
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
        """Drops the episode of `slot`, if there is one."""
        self._check_free(slot)
        episode = self._episodes.pop(slot, None)
        if episode is not None:
            self._leave(episode)

    def close(self) -> None:
        """Ends all workers and their children."""
        end_all(self._workers)
        self._workers.clear()
        self._episodes.clear()
        self._selector.close()
        self._finalizer.detach()

    def _check_free(self, slot: int) -> None:
        if slot in self._episodes and self._episodes[slot].pending:
            raise ValueError(f"slot {slot} is still busy with its last request")

    def _leave(self, episode: _Episode) -> None:
        if episode.worker.episodes.get(episode.seat) is episode:
            del episode.worker.episodes[episode.seat]

    def _place(self, task: Task) -> _Worker:
        """Returns the worker for a new episode of `task`."""
        roomy = [worker for worker in self._workers if len(worker.episodes) < self._capacity]
        best = min(roomy, key=lambda worker: self._reluctance(worker, task), default=None)
        if best is None or (len(self._workers) < self.workers and self._reluctance(best, task) > 0):
            arguments = (self._module, self._options, self._deadlines, self._memory_limit_mb, self._selector)
            self._workers.append(_Worker(*arguments))
            return self._workers[-1]
        grown = best.memory_mb > RECYCLED_SHARE * self._memory_limit_mb
        if grown and not best.queue and best.answers >= RECYCLED_ANSWERS:
            self.recycled += 1
            self._renew(best)
        return best

    def _reluctance(self, worker: _Worker, task: Task) -> int:
        bonus = any(episode.task == task for episode in worker.episodes.values()) * SAME_TASK_BONUS
        return len(worker.episodes) - bonus

    def _send_play(self, episode: _Episode, replay: bool = False) -> None:
        """Sends a reset; with `replay`, also the actions before the pending step."""
        actions = episode.actions[: len(episode.actions) - (episode.pending == "step")] if replay else []
        seconds = self._deadlines.reset + len(actions) * self._deadlines.step
        message = {"op": "play", "seat": episode.seat, "task": episode.task, "actions": actions}
        episode.worker.submit((episode, replay), seconds, message)

    def _send_step(self, episode: _Episode) -> None:
        message = {"op": "step", "seat": episode.seat, "action": episode.actions[-1]}
        episode.worker.submit((episode, False), self._deadlines.step, message)

    def _wait(self, seconds: float | None) -> None:
        """Handles the next answers or missed deadlines, or returns after `seconds`."""
        # Answers in the pipes come before deadlines: the host may have been busy for minutes.
        deadline = min((worker.seconds_left()[0] for worker in self._workers), default=float("inf"))
        limit = max(0.0, min(deadline, float("inf") if seconds is None else seconds))
        events = self._selector.select(None if limit == float("inf") else limit)
        for key, mask in events:
            worker: _Worker = key.data
            if cast(IO[bytes], key.fileobj).closed:  # a worker replaced earlier in this round
                continue
            if mask & selectors.EVENT_WRITE:
                worker.flush()
                continue
            try:
                for request, answer in worker.read():
                    self._handle(request, answer)
            except WorkerFailed as failure:
                self._replace(worker, str(failure))
        if not events:
            for worker in self._workers:
                left, why = worker.seconds_left()
                if left <= 0:
                    self._replace(worker, why)

    def _handle(self, request: Request, answer: dict[str, Any]) -> None:
        episode, replay = request.about
        worker = episode.worker
        if worker.episodes.get(episode.seat) is not episode:  # given up during its replay
            return
        try:
            if "user_error" in answer:
                self._refuse(episode, UserError(answer["user_error"]))
                return
            if "observation" not in answer:
                raise WorkerFailed(f"its environment raised {answer.get('error')}")
            observation = _observation(answer["observation"])
            if replay:
                if observation != episode.last:
                    raise WorkerFailed("the episode came out differently when it was played again")
                return
        except WorkerFailed:
            worker.queue.appendleft(request)  # the failed request stays at the head, where _replace looks for it
            raise
        episode.last = observation
        episode.pending = ""
        episode.failures = 0
        if observation.done:
            self._leave(episode)
        self._ready.append((episode.slot, observation))

    def _refuse(self, episode: _Episode, error: UserError) -> None:
        """Drops an episode; `get` raises `error`."""
        self._leave(episode)
        del self._episodes[episode.slot]
        self._ready.append((episode.slot, error))

    def _replace(self, worker: _Worker, reason: str) -> None:
        """Replaces a failed worker and replays its live episodes."""
        words = worker.last_words()
        culprit = worker.queue[0].about[0] if worker.queue else None
        self.restarts += 1
        if culprit is not None and worker.episodes.get(culprit.seat) is culprit:
            culprit.failures += 1
            if culprit.failures >= FAILURES_ALLOWED:
                last = f" and last wrote {words!r}" if words else ""
                message = (
                    f"the environment worker failed {culprit.failures} times in a row on task {culprit.task['id']!r}: "
                    f"{reason}{last}; leave this task out or repair its files."
                )
                self._refuse(culprit, UserError(message))
        self._renew(worker)

    def _renew(self, worker: _Worker) -> None:
        """Restarts the process of `worker` and replays its episodes."""
        worker.end()
        worker.start()
        for episode in worker.episodes.values():
            self._send_play(episode, replay=episode.pending != "reset")
            if episode.pending == "step":
                self._send_step(episode)
