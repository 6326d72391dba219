"""The turn scheduler: episodes in, trajectories out. Host side; owns no maths.

Slots are split over lanes (lane.py), each with its own cache, its own share of the episodes and its own turns: while
one lane's actions are being played by the environment processes, the turns of others are being decoded, and a slow
environment holds up its own lane only. Inside a lane, a row whose turn ended sends its action off at once while longer
turns go on in the next block; a finished episode leaves its row at once and the next one, whose reset was sent ahead, takes
it; and when there is none left, a lane shrinks to half its rows whenever half would do.

What a lane does next depends on what its episodes did and said, never on when. So the same episodes give the same
trajectories, bit for bit, whatever the workers' number and delays.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from epo_jax.common.errors import UserError
from epo_jax.envs import agent
from epo_jax.envs.base import Observation, Task
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models import lora
from epo_jax.models.decoder import DecoderConfig, Params, unstack
from epo_jax.models.members import Members
from epo_jax.models.tokenizer import ChatTokenizer
from epo_jax.parallel import hosts, mesh
from epo_jax.rollout.lane import SMALLEST_LANE, Answer, Lane, Programs, Sampler, Turn
from epo_jax.rollout.prompts import RolloutConfig, SamplingConfig, next_prompt
from epo_jax.rollout.trajectory import Trajectory

# Lanes of a device at work at the same time. More would not be quicker: one works while another is being read and answered.
_THREADS = 2

# Seconds between looks at the environments while the device is at work and a lane waits for them.
_LOOK = 0.001


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode to play: `id` seeds its sampling, `group` says which episodes share its task."""

    id: int
    task: Task
    group: int = 0


@dataclasses.dataclass
class RolloutStats:
    """Where the wall time of a rollout went (seconds), and what came of it.

    `prefill_seconds` and `decode_seconds` are summed over lanes, which overlap. `env_wait_seconds` is the time in which no
    lane had anything to do but wait for its environments.
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


@dataclasses.dataclass
class _Live:
    """An episode that occupies a row.

    Attributes:
        place: (its member, its index among that member's trajectories).
        tokenizer: its member's.
        handle: the pool's slot that plays it.
        first: what it saw after the reset.
        prompt: ids not in the cache yet, to be read next.
        fresh: the row must be emptied before it reads them.
        answer: the turn's tokens so far, with their statistics.
    """

    episode: Episode
    place: tuple[int, int]
    tokenizer: ChatTokenizer
    handle: int
    trajectory: Trajectory
    first: Observation | None = None
    prompt: list[int] = dataclasses.field(default_factory=list)
    fresh: bool = True
    answer: Answer = dataclasses.field(default_factory=lambda: Answer([], [], []))
    policy_tokens: int = 0


class _LaneEpisodes:
    """A lane and its episodes: those in its rows, and of each member those whose reset is sent ahead and the queue.

    Its rows come in multiples of `shards`. `waiting` holds the handles whose observations the next turns need, `later` those
    that may still come after them.
    """

    def __init__(self, lane: Lane, shards: int, players: list["_Player"], hands: list[list[tuple[int, Episode]]]):
        self.lane, self.shards, self.players = lane, shards, players
        self.rows: list[_Live | None] = [None] * (lane.members * lane.size)
        self.queues = [collections.deque(hand) for hand in hands]
        self.ahead: list[collections.deque[_Live]] = [collections.deque() for _ in hands]
        self.waiting: set[int] = set()
        self.later: set[int] = set()


class _Player(NamedTuple):
    """A player with its number and, in a run of several processes, its share of the episodes."""

    number: int
    tokenizer: ChatTokenizer
    episodes: list[Episode]


def _deal(episodes: list[Episode], lanes: int) -> list[list[tuple[int, Episode]]]:
    """Deals episodes, with their places, to lanes in equal shares; neighbours of one group stay together where they can."""
    share = -(-len(episodes) // lanes)
    hands: list[list[tuple[int, Episode]]] = [[] for _ in range(lanes)]
    for _, members in itertools.groupby(enumerate(episodes), key=lambda pair: pair[1].group):
        members = list(members)
        while members:
            # The emptiest lane; one of them always has room, since no share is exceeded.
            hand = min(hands, key=len)
            room = share - len(hand)
            hand += members[:room]
            members = members[room:]
    return hands


class _Rollout:
    """The state of one `collect` call. Every `enter` brings lanes that some policies share; `run` plays them all."""

    def __init__(self, pool: EnvPool, model: DecoderConfig, config: RolloutConfig):
        self.pool, self.config = pool, config
        self.model = model if config.dtype is None else dataclasses.replace(model, dtype=config.dtype)
        self.programs = Programs()
        self.done: dict[tuple[int, int], Trajectory] = {}
        self.inbox: dict[int, Observation] = {}
        self.under_way = 0  # requests that the pool has not answered
        self.stats = RolloutStats()
        self.wanted: list[int] = []  # tokens of first prompts with their answers that had no room
        self.lanes: collections.deque[_LaneEpisodes] = collections.deque()  # that have not begun
        self.devices: set[jax.Device] = set()
        self.open = self.threads = 0  # lanes that may have begun and not ended, and those at work at the same time
        self.free_handles: list[int] = []
        self.handles = itertools.count()

    def enter(self, players: list[_Player], params: Params | Members, sampler: Sampler) -> None:
        """Deals the players' episodes to lanes of their own. `params`, unstacked, and the sampler's keys are one policy's, or the
        members' in the order of `players`."""
        config = self.config
        slots = min(config.slots, max(len(player.episodes) for player in players))
        lanes = max(1, min(config.lanes, slots))
        on = mesh.mesh_of(params)
        # Rows that devices share come in multiples of these.
        shards = mesh.row_shards(on) if on else 1
        size = -(-slots // (lanes * shards)) * shards
        for hands in zip(*(_deal(player.episodes, lanes) for player in players), strict=True):
            if any(hands):
                lane = Lane(self.model, params, size, config.max_tokens, sampler, self.programs, config.cache_dtype, on)
                self.lanes.append(_LaneEpisodes(lane, shards, players, list(hands)))
        self.stop_tokens = sampler.stop_tokens
        here = {d for x in jax.tree.leaves(params) if isinstance(x, jax.Array) for d in x.devices()}
        self.devices |= here
        # Programs that span devices must reach all of them in one order.
        apart = max(1, len(self.devices)) if len(here) <= 1 else 0
        self.threads = max(1, _THREADS * apart)
        self.open = max(self.open, lanes * max(1, apart))

    def run(self) -> None:
        started = time.perf_counter()
        working: dict[concurrent.futures.Future, _LaneEpisodes] = {}
        idle: collections.deque[_LaneEpisodes] = collections.deque()
        with _executor(max(1, self.threads)) as executor:
            while self.lanes or idle or working:
                while self.lanes and len(idle) + len(working) < self.open:
                    self.admit(self.lanes[0])
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
                    for future in self.watch(working, len(idle)):
                        lane = working.pop(future)
                        self.hear(lane, future.result())
                        idle.append(lane)
                elif idle:
                    waited = time.perf_counter()
                    self.look(timeout=None)
                    self.stats.env_wait_seconds += time.perf_counter() - waited
        self.stats.seconds = time.perf_counter() - started
        if self.wanted and len(self.wanted) == len(self.done):
            raise UserError(
                f"config.agent.max_tokens={self.config.max_tokens} has no room for the first prompt of any episode; they take "
                f"{min(self.wanted)} to {max(self.wanted)} tokens with an answer of {self.config.response_tokens} "
                f"(config.agent.response_tokens): set it to {max(self.wanted)}, better to several times as much."
            )

    def trajectories(self, player: _Player) -> list[Trajectory]:
        """What a player played, in the order of its episodes."""
        return [self.done[player.number, i] for i in range(len(player.episodes))]

    def watch(self, working: dict, waiting_lanes: int) -> list[concurrent.futures.Future]:
        """Waits until a lane's work is done, or until a lane that waits for environments could be put to work."""
        spare = len(working) < self.threads and waiting_lanes > 0
        done, _ = concurrent.futures.wait(
            working, _LOOK if spare else None, return_when=concurrent.futures.FIRST_COMPLETED
        )
        while self.under_way and self.look(timeout=0.0):
            pass
        return list(done)

    def look(self, timeout: float | None) -> bool:
        """Takes one observation from the pool; False when none is there."""
        try:
            handle, self.inbox[handle] = self.pool.get(timeout)
        except TimeoutError:
            return False
        self.under_way -= 1
        return True

    def reset(self, player: _Player, place: int, episode: Episode) -> _Live:
        """Starts an episode."""
        handle = self.free_handles.pop() if self.free_handles else next(self.handles)
        self.pool.reset(handle, episode.task)
        self.under_way += 1
        trajectory = Trajectory(task=episode.task, group=episode.group, episode=episode.id)
        return _Live(episode, (player.number, place), player.tokenizer, handle, trajectory)

    def admit(self, lane: _LaneEpisodes) -> None:
        """Gives every empty row an episode of its member's: one that was reset ahead, whose first turn comes now, or else the
        queue's next."""
        for row, live in enumerate(lane.rows):
            member = row // lane.lane.size
            if live is None and lane.ahead[member]:
                lane.rows[row] = lane.ahead[member].popleft()
                lane.waiting.add(lane.rows[row].handle)
            elif live is None and lane.queues[member]:
                lane.rows[row] = self.reset(lane.players[member], *lane.queues[member].popleft())
                lane.later.add(lane.rows[row].handle)
        for player, ahead, queue in zip(lane.players, lane.ahead, lane.queues, strict=True):
            while queue and len(ahead) < self.config.ahead:
                ahead.append(self.reset(player, *queue.popleft()))

    def next_turns(self, lane: _LaneEpisodes) -> dict[int, Turn] | None:
        """What the lane's rows are to do next; None while an observation is missing, and when nothing is left."""
        while True:
            if not lane.waiting <= self.inbox.keys():
                return None
            for row, live in enumerate(lane.rows):
                if live is not None and live.handle in lane.waiting and self.receive(live, self.inbox.pop(live.handle)):
                    self.done[live.place] = live.trajectory
                    self.free_handles.append(live.handle)
                    lane.rows[row] = None
            lane.waiting.clear()
            self.admit(lane)
            if lane.waiting:
                continue
            self.shrink(lane)
            turns = {row: self.turn_of(live) for row, live in enumerate(lane.rows) if live is not None and live.prompt}
            if turns or not lane.later:
                return turns
            lane.waiting, lane.later = lane.later, set()

    def budget_of(self, live: _Live) -> int:
        """Most tokens in the turn that the episode is at."""
        return self.config.response_tokens

    def turn_of(self, live: _Live) -> Turn:
        said = len(live.answer.tokens)
        budget = min(self.budget_of(live) - said, self.config.block)
        return Turn(live.prompt, live.fresh, live.episode.id, len(live.trajectory.actions), said, budget)

    def receive(self, live: _Live, observation: Observation) -> bool:
        """Books an observation; True when the episode is over."""
        trajectory, config = live.trajectory, self.config
        history = list(zip(trajectory.observations, trajectory.actions, strict=True))
        trajectory.observations.append(observation.text)
        trajectory.won, trajectory.score = observation.won, observation.score
        if history:
            trajectory.rewards.append(observation.reward)
            if observation.done:
                return True
        else:
            live.first = observation
            trajectory.goal = observation.goal
        last = trajectory.tokens[-1] if history else None
        ids = next_prompt(live.tokenizer, config, live.first, history, observation, last)
        live.fresh = config.window is not None or not history
        before = 0 if live.fresh else len(trajectory.tokens)
        answer = config.response_tokens
        full = before + len(ids) + answer > config.max_tokens
        silent = live.policy_tokens + answer > config.max_policy_tokens
        if full or silent or len(history) == config.max_turns:
            trajectory.truncated = True
            trajectory.full = full or silent
            if full and not history:
                self.wanted.append(len(ids) + answer)
            return True
        # The token that ended the last turn is sampled and not read yet.
        live.prompt = ids if live.fresh else [trajectory.tokens[-1], *ids]
        trajectory.append_prompt(ids, new_context=live.fresh)
        return False

    def shrink(self, lane: _LaneEpisodes) -> None:
        """Halves the lane while the live episodes of every member fit in half of its rows and nobody is waiting for a row."""
        before = size = lane.lane.size
        rows = [range(first, first + size) for first in range(0, len(lane.rows), size)]
        live = [[row for row in mine if lane.rows[row] is not None] for mine in rows]
        most = max(map(len, live))
        if most and not any(lane.queues) and not any(lane.ahead):
            while size % (2 * lane.shards) == 0 and size // 2 >= max(most, SMALLEST_LANE):
                size //= 2
        if size < before:
            keep = []
            for mine, full in zip(rows, live, strict=True):
                keep += (full + [row for row in mine if row not in full])[:size]
            lane.lane.keep(keep)
            lane.rows = [lane.rows[row] for row in keep]

    def hear(self, lane: _LaneEpisodes, answers: dict[int, Answer]) -> None:
        """Books what the rows of a lane sampled and sends off the actions of turns that ended."""
        for row, answer in answers.items():
            live = lane.rows[row]
            for so_far, more in zip(live.answer, answer, strict=True):
                so_far += more
            self.stats.policy_tokens += len(answer.tokens)
            live.policy_tokens += len(answer.tokens)
            said = live.answer.tokens
            live.fresh, live.prompt = False, said[-1:]
            if said[-1] in self.stop_tokens or len(said) == self.budget_of(live):
                self.act(live)
                lane.waiting.add(live.handle)
        lane.waiting |= lane.later
        lane.later.clear()

    def act(self, live: _Live) -> None:
        """Ends a turn: its answer becomes an action, which goes to the environment."""
        trajectory = live.trajectory
        text, opened = live.tokenizer.decode(live.answer.tokens), live.tokenizer.frame.opened
        parsed = agent.parse_action(text, self.config.style == "tagged", opened)
        trajectory.append_answer(*live.answer)
        trajectory.actions.append(parsed.action)
        trajectory.valid.append(parsed.valid)
        live.answer, live.prompt = Answer([], [], []), []
        self.pool.step(live.handle, parsed.action)
        self.under_way += 1
        self.stats.env_steps += 1


@contextlib.contextmanager
def _executor(threads: int) -> Iterator[concurrent.futures.Executor]:
    """Threads that are waited for at the end, but where somebody asks to stop: what one of them compiles can take minutes."""
    executor, wait = concurrent.futures.ThreadPoolExecutor(threads), True
    try:
        yield executor
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        executor.shutdown(wait=wait, cancel_futures=not wait)


class Player(NamedTuple):
    """A policy's part of a rollout: a run has one player, a sweep has one for each member.

    Attributes:
        episodes: what it plays, perhaps nothing.
        key: seeds its sampling, together with an episode's id.
    """

    episodes: list[Episode]
    tokenizer: ChatTokenizer
    key: jax.Array


def collect(
    players: Sequence[Player],
    params: Params | Members,
    pool: EnvPool,
    model: DecoderConfig,
    config: RolloutConfig,
    sampling: SamplingConfig,
) -> tuple[list[list[Trajectory]], RolloutStats]:
    """Plays every episode once; returns each player's trajectories, in the order of its episodes.

    A trajectory depends on its player's key and parameters, its episode's id and task, and the sampling settings. With the
    same episodes and slots it is the same bit for bit, whatever the timing and the number of workers. Other episodes around
    it, or another number of slots, change the shapes of the batches, which reassociates float sums.

    If a run has several processes, each plays its share of the episodes in its share of the slots, and all processes get all
    trajectories.

    Args:
        params: the only player's, on one device or on a mesh; or `Members`, one for each player, whose members may be sharded
            over a mesh with the axis "member": each device then plays its own members.
        config: with `Members`, its `at_once` applies and its `devices` does not.
    """
    slots = -(-config.slots // jax.process_count())
    rollout = _Rollout(pool, model, dataclasses.replace(config, slots=slots))
    mine = [_Player(i, p.tokenizer, hosts.share(p.episodes)) for i, p in enumerate(players)]
    block = min(config.block, config.response_tokens)
    for some, policy, key in _policies(players, params, rollout.model, config):
        if any(player.episodes for player in mine[some]):
            stop_ids = players[0].tokenizer.stop_ids
            rollout.enter(mine[some], policy, Sampler(key, stop_ids, sampling, block))
    rollout.run()
    return _of_all_processes([rollout.trajectories(player) for player in mine], rollout.stats)


def _policies(
    players: Sequence[Player], params: Params | Members, model: DecoderConfig, config: RolloutConfig
) -> Iterator[tuple[slice, Params | Members, jax.Array]]:
    """Yields (players, parameters unstacked where they sample, sampling keys) for each program call that has its own lanes."""
    if not isinstance(params, Members):
        yield slice(0, 1), _sampled_from(params, model, config.devices), players[0].key
        return
    keys, unstacked = jnp.stack([player.key for player in players]), functools.partial(unstack, model)
    devices = _member_devices(params)
    shared = [unstacked(jax.device_put(params.shared, device)) for device in devices]
    share = len(players) // len(devices)
    for first in range(0, share, config.at_once):
        # The next members of each device, so that the lanes of all devices begin together.
        for device, base, start in zip(devices, shared, range(0, len(players), share), strict=True):
            some = slice(start + first, start + min(first + config.at_once, share))
            which = some if config.at_once > 1 else some.start
            if any(player.episodes for player in players[some]):
                own, key = jax.device_put(jax.tree.map(lambda x, which=which: x[which], (params.own, keys)), device)
                policy = Members(base, jax.vmap(unstacked)(own)) if config.at_once > 1 else lora.join(base, unstacked(own))
                yield some, policy, key


def _member_devices(params: Members) -> list[jax.Device | None]:
    """The devices that the members are sharded over; [None] if all are in one place."""
    sharding = jax.tree.leaves(params.own)[0].sharding
    return list(sharding.mesh.devices.flat) if len(sharding.device_set) > 1 else [None]


def check_devices(devices: int) -> None:
    """Raises UserError unless this process has as many devices as `config.rollout.devices`."""
    here = jax.local_devices()
    if devices > len(here):
        raise UserError(
            f"config.rollout.devices={devices} cannot be had: this process has {len(here)} {here[0].platform} device"
            f"{'s' if len(here) > 1 else ''}; choose at most as many."
        )


def _sampled_from(params: Params, model: DecoderConfig, devices: int) -> Params:
    """A run's parameters, unstacked, where this process samples: put together from the mesh of all, or copied to `devices`."""
    params = jax.tree.map(lambda x: x.astype(model.dtype), params)  # before they travel
    if mesh.mesh_of(params) is not None:
        params = mesh.on_this_host(params)
    elif devices > 1:
        check_devices(devices)
        params = jax.device_put(params, mesh.replicated(mesh.make_mesh(devices, 1, 1, jax.local_devices())))
    return unstack(model, params)


def _of_all_processes(
    played: list[list[Trajectory]], stats: RolloutStats
) -> tuple[list[list[Trajectory]], RolloutStats]:
    """What the players of all processes played, and the sum of their stats."""
    if jax.process_count() == 1:
        return played, stats
    parts = hosts.gather([[[vars(t) for t in trajectories] for trajectories in played], vars(stats)])
    of_each = [RolloutStats(**fields) for _, fields in parts]
    together = sum(of_each, start=RolloutStats())
    together.seconds = max(s.seconds for s in of_each)
    every = zip(*(trajectories for trajectories, _ in parts), strict=True)
    return [[Trajectory(**fields) for part in player for fields in part] for player in every], together


def warn_full(trajectories: Sequence[Trajectory], config: RolloutConfig) -> None:
    """Prints how many episodes ended for want of room, if any did."""
    if full := sum(t.full for t in trajectories):
        keys = "config.agent.max_tokens" + ("" if config.window else " or config.train.rows_policy_tokens")
        print(
            f"warning: {full} of {len(trajectories)} episodes ended as the next prompt or its answer had no room; raise {keys}, "
            "or shorten prompts (config.env.hints, config.agent.history_turns)",
            flush=True,
        )


def choose_groups(rounds: list[list[Trajectory]], groups: int) -> tuple[list[Trajectory], int]:
    """The first `groups` groups whose episodes differ in their return, of all rounds played (DAPO's dynamic sampling, arXiv
    2503.14476), numbered anew from 0; where they are too few, uniform ones fill up. Returns (trajectories, uniform groups)."""
    found = [list(g) for trajectories in rounds for _, g in itertools.groupby(trajectories, key=lambda t: t.group)]
    uniform = [len({sum(t.rewards) for t in members}) == 1 for members in found]
    kept = sorted(sorted(range(len(found)), key=uniform.__getitem__)[:groups])
    chosen = [dataclasses.replace(t, group=number) for number, i in enumerate(kept) for t in found[i]]
    return chosen, sum(uniform[i] for i in kept)
