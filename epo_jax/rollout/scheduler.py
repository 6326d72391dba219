"""The turn scheduler: which lane and which environment does what, and when.

A slot is an environment that plays an episode; a row is a row of a lane's cache. Slots are split over lanes (lane.py), each
with its own cache, its own episodes and its own turns. While the environments of one lane play its actions, other lanes decode
their turns, and a slow environment holds up its own lane only. Inside a lane, a row whose turn ended submits its action at
once; longer turns go on in the next block. A finished episode leaves its row at once for the next one, whose environment was
reset ahead. If no episode is left to begin, a lane shrinks to half its rows whenever half is enough.

What a lane does next depends on what its episodes did, never on when. So the same episodes give the same trajectories, bit for
bit, whatever the number of workers and their delays.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from epo_jax.envs.base import Observation
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models.decoder import DecoderConfig, Params
from epo_jax.models.members import Members
from epo_jax.parallel import mesh
from epo_jax.rollout.episode import Answer, LiveEpisode, Turn
from epo_jax.rollout.lane import SMALLEST_LANE, Lane, Programs, Sampler
from epo_jax.rollout.prompts import RolloutConfig

# Lanes of a device at work at the same time. More would not be faster: one computes while the host prepares another.
_THREADS = 2

# Seconds between polls of the environments while the device computes and a lane waits for observations.
_POLL_SECONDS = 0.001


@dataclasses.dataclass
class RolloutStats:
    """Wall time of a rollout, in seconds, and counts.

    `prefill_seconds` and `decode_seconds` are summed over lanes, which overlap. `env_wait_seconds` is the time in which all
    lanes waited for their environments.
    """

    seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    env_wait_seconds: float = 0.0
    prompt_tokens: int = 0
    policy_tokens: int = 0
    env_steps: int = 0

    def __add__(self, other: "RolloutStats") -> "RolloutStats":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return RolloutStats(*(a + b for a, b in pairs))


class _Slot(NamedTuple):
    """A slot of the pool and the episode that it plays."""

    number: int
    episode: LiveEpisode


class _LaneEpisodes:
    """A lane and its episodes.

    Attributes:
        shards: the rows of each member come in multiples of this.
        rows: the slot of each row; None if the row is empty.
        queues: for each member, episodes that have not begun.
        ahead: for each member, slots that were reset before a row is free.
        needed: numbers of the slots whose observations the next turns wait for.
        deferred: numbers of the slots whose observations may come after the next turns.
    """

    def __init__(self, lane: Lane, shards: int, queues: Sequence[Sequence[LiveEpisode]]):
        self.lane, self.shards = lane, shards
        self.rows: list[_Slot | None] = [None] * (lane.members * lane.size)
        self.queues = [collections.deque(queue) for queue in queues]
        self.ahead: list[collections.deque[_Slot]] = [collections.deque() for _ in queues]
        self.needed: set[int] = set()
        self.deferred: set[int] = set()

    def next_turns(self) -> dict[int, Turn]:
        """The next turn of every row whose episode has one."""
        turns = {row: slot.episode.next_turn() for row, slot in enumerate(self.rows) if slot is not None}
        return {row: turn for row, turn in turns.items() if turn is not None}

    def shrink(self) -> None:
        """Halves the lane while half its rows hold every member's episodes and no episode waits for a row."""
        before = size = self.lane.size
        rows = [range(first, first + size) for first in range(0, len(self.rows), size)]
        full = [[row for row in of_member if self.rows[row] is not None] for of_member in rows]
        most = max(map(len, full))
        if most and not any(self.queues) and not any(self.ahead):
            while size % (2 * self.shards) == 0 and size // 2 >= max(most, SMALLEST_LANE):
                size //= 2
        if size < before:
            keep = []
            for of_member, live in zip(rows, full, strict=True):
                keep += (live + [row for row in of_member if row not in live])[:size]
            self.lane.keep(keep)
            self.rows = [self.rows[row] for row in keep]


def _assign(episodes: Sequence[LiveEpisode], lanes: int) -> list[list[LiveEpisode]]:
    """Assigns episodes to lanes in equal shares; neighbors of one group stay together if they can."""
    share = -(-len(episodes) // lanes)
    assignments: list[list[LiveEpisode]] = [[] for _ in range(lanes)]
    for _, group in itertools.groupby(episodes, key=lambda live: live.episode.group):
        group = list(group)
        while group:
            # The emptiest lane always has room, since no lane exceeds its share.
            assignment = min(assignments, key=len)
            room = share - len(assignment)
            assignment += group[:room]
            group = group[room:]
    return assignments


class Scheduler:
    """The state of one rollout: `add_lanes` brings lanes that some policies share, `run` plays all of them."""

    def __init__(self, pool: EnvPool, model: DecoderConfig, config: RolloutConfig, reach: Callable[[int], None]):
        self.pool, self.model, self.config = pool, model, config
        self.reach, self.ended = reach, 0  # takes the number of episodes that have ended
        self.programs = Programs()
        self.stats = RolloutStats()
        self.lanes: collections.deque[_LaneEpisodes] = collections.deque()  # lanes that have not begun
        self.devices: set[jax.Device] = set()
        self.open_lanes = 0  # lanes that may have begun and not ended
        self.threads = 0  # lanes that may compute at the same time
        self.inbox: dict[int, Observation] = {}  # by slot
        self.requests = 0  # resets and steps that the pool has not answered
        self.free_slots: list[int] = []
        self.new_slots = itertools.count()

    def add_lanes(self, episodes: Sequence[Sequence[LiveEpisode]], params: Params | Members, sampler: Sampler) -> None:
        """Assigns episodes, one list for each member, to lanes of their own.

        Args:
            params: unstacked, of one policy or, in the order of `episodes`, of the members; the sampler's keys alike.
        """
        config, on = self.config, mesh.mesh_of(params)
        shards = mesh.row_shards(on) if on else 1
        slots = min(config.slots, max(map(len, episodes)))
        lanes = max(1, min(config.lanes, slots))
        size = -(-slots // (lanes * shards)) * shards
        for queues in zip(*(_assign(of_member, lanes) for of_member in episodes), strict=True):
            if any(queues):
                lane = Lane(self.model, params, size, config.max_tokens, sampler, self.programs, config.cache_dtype, on)
                self.lanes.append(_LaneEpisodes(lane, shards, queues))
        own = {device for x in jax.tree.leaves(params) if isinstance(x, jax.Array) for device in x.devices()}
        self.devices |= own
        # Programs that span devices must reach all of them in the same order: one lane computes at a time.
        spanning = len(own) > 1
        devices = 1 if spanning else max(1, len(self.devices))
        self.threads = 1 if spanning else _THREADS * devices
        self.open_lanes = max(self.open_lanes, lanes * devices)

    def run(self) -> None:
        """Plays all episodes to their end."""
        started = time.perf_counter()
        working: dict[concurrent.futures.Future, _LaneEpisodes] = {}
        idle: collections.deque[_LaneEpisodes] = collections.deque()
        with _executor(max(1, self.threads)) as executor:
            while self.lanes or idle or working:
                while self.lanes and len(idle) + len(working) < self.open_lanes:
                    self.fill_rows(self.lanes[0])
                    idle.append(self.lanes.popleft())
                for _ in range(len(idle)):
                    lane = idle.popleft()
                    if turns := self.next_turns(lane):
                        working[executor.submit(lane.lane.play, turns)] = lane
                    elif any(lane.rows):
                        idle.append(lane)
                    else:
                        self.stats.prefill_seconds += lane.lane.prefill_seconds
                        self.stats.decode_seconds += lane.lane.decode_seconds
                        self.stats.prompt_tokens += lane.lane.prompt_tokens
                if working:
                    for future in self.wait(working, len(idle)):
                        lane = working.pop(future)
                        self.on_tokens(lane, future.result())
                        idle.append(lane)
                elif idle:
                    waited = time.perf_counter()
                    self.poll(timeout=None)
                    self.stats.env_wait_seconds += time.perf_counter() - waited
        self.stats.seconds = time.perf_counter() - started

    def wait(self, working: dict, idle_lanes: int) -> list[concurrent.futures.Future]:
        """Waits until a lane's work is done, or a moment if a thread is free for a lane that waits for environments."""
        spare = len(working) < self.threads and idle_lanes > 0
        done, _ = concurrent.futures.wait(
            working, _POLL_SECONDS if spare else None, return_when=concurrent.futures.FIRST_COMPLETED
        )
        while self.requests and self.poll(timeout=0.0):
            pass
        return list(done)

    def poll(self, timeout: float | None) -> bool:
        """Takes one observation from the pool; False if there is none."""
        try:
            slot, self.inbox[slot] = self.pool.get(timeout)
        except TimeoutError:
            return False
        self.requests -= 1
        return True

    def reset(self, episode: LiveEpisode) -> _Slot:
        """Resets a free slot to the episode's task."""
        slot = self.free_slots.pop() if self.free_slots else next(self.new_slots)
        self.pool.reset(slot, episode.episode.task)
        self.requests += 1
        return _Slot(slot, episode)

    def fill_rows(self, lane: _LaneEpisodes) -> None:
        """Fills every empty row with a slot that was reset ahead, whose turn comes now, else with the next episode's."""
        for row, slot in enumerate(lane.rows):
            member = row // lane.lane.size
            if slot is None and lane.ahead[member]:
                lane.rows[row] = lane.ahead[member].popleft()
                lane.needed.add(lane.rows[row].number)
            elif slot is None and lane.queues[member]:
                lane.rows[row] = self.reset(lane.queues[member].popleft())
                lane.deferred.add(lane.rows[row].number)
        for ahead, queue in zip(lane.ahead, lane.queues, strict=True):
            while queue and len(ahead) < self.config.ahead:
                ahead.append(self.reset(queue.popleft()))

    def next_turns(self, lane: _LaneEpisodes) -> dict[int, Turn]:
        """The turns that the lane plays next, by row; none while it waits for an observation, and after its last turn."""
        while lane.needed <= self.inbox.keys():
            for row, slot in enumerate(lane.rows):
                if slot is not None and slot.number in lane.needed:
                    slot.episode.on_observation(self.inbox.pop(slot.number))
                    if slot.episode.ended:
                        self.ended += 1
                        self.reach(self.ended)
                        self.free_slots.append(slot.number)
                        lane.rows[row] = None
            lane.needed.clear()
            self.fill_rows(lane)
            if lane.needed:
                continue
            lane.shrink()
            if (turns := lane.next_turns()) or not lane.deferred:
                return turns
            lane.needed, lane.deferred = lane.deferred, set()
        return {}

    def on_tokens(self, lane: _LaneEpisodes, answers: dict[int, Answer]) -> None:
        """Hands sampled tokens to their episodes, and the actions of turns that ended to the environments."""
        for row, sampled in answers.items():
            slot = lane.rows[row]
            self.stats.policy_tokens += len(sampled.tokens)
            action = slot.episode.on_tokens(sampled)
            if action is not None:
                self.submit_action(slot, action)
                lane.needed.add(slot.number)
        lane.needed |= lane.deferred
        lane.deferred.clear()

    def submit_action(self, slot: _Slot, action: str) -> None:
        self.pool.step(slot.number, action)
        self.requests += 1
        self.stats.env_steps += 1


@contextlib.contextmanager
def _executor(threads: int) -> Iterator[concurrent.futures.Executor]:
    """Threads that end with the context, except after an interrupt: a compilation in one of them can take minutes."""
    executor, wait = concurrent.futures.ThreadPoolExecutor(threads), True
    try:
        yield executor
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        executor.shutdown(wait=wait, cancel_futures=not wait)
