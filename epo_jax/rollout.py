"""The turn scheduler: episodes in, trajectories out. Host side; owns no maths.

Slots are split over two lanes, each with its own cache. While one lane's actions are being played by the environment
processes, the other lane's turns are being decoded. A finished episode leaves its row at once and the next one takes it; when
the queue is empty a lane shrinks to half its rows whenever half would do, so that finished episodes cost nothing.
"""

import collections
import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

from epo_jax.envs import agent
from epo_jax.envs.base import Observation, Task
from epo_jax.envs.pool import EnvPool
from epo_jax.models import generate
from epo_jax.models.decoder import DecoderConfig, Params
from epo_jax.models.tokenizer import ChatTokenizer
from epo_jax.trajectory import Trajectory

_LANES = 2
_PREFILL_BUCKETS = (16, 32, 128, 512)
_SMALLEST_LANE = 4


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode to play: `id` seeds its sampling, `group` says which episodes share its task."""

    id: int
    task: Task
    group: int = 0


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Static settings of a rollout.

    Attributes:
        slots: episodes in flight at once.
        max_turns: turn limit of an episode.
        max_tokens: most tokens in an episode's conversation; an episode that would outgrow it ends as truncated.
        max_policy_tokens: most tokens that the policy may emit in an episode, with the same consequence.
        response_tokens: most tokens in a turn.
        style: prompt style, see `epo_jax.envs.agent`.
    """

    slots: int
    max_turns: int
    max_tokens: int
    max_policy_tokens: int
    response_tokens: int
    style: str


@dataclasses.dataclass
class RolloutStats:
    """Where the wall time of a rollout went (seconds), and what came of it."""

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
    """An episode that occupies a row. `prompt` holds ids not yet in the cache."""

    episode: Episode
    handle: int
    trajectory: Trajectory
    prompt: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Lane:
    cache: generate.Cache
    rows: list[_Live | None]
    fresh: np.ndarray  # rows whose cache must be emptied by the next extend


@jax.jit
def _keep_rows(cache: generate.Cache, rows: jax.Array) -> generate.Cache:
    return jax.tree.map(lambda a: a[rows], cache)


class _Rollout:
    """The state of one `collect` call."""

    def __init__(self, episodes, pool, tokenizer, model, params, key, config, temperature):
        self.queue = collections.deque(enumerate(episodes))
        self.pool, self.tokenizer, self.model, self.params = pool, tokenizer, model, params
        self.key, self.config, self.temperature = key, config, temperature
        self.done: list[Trajectory | None] = [None] * len(episodes)
        self.order: dict[int, int] = {}
        slots = min(config.slots, len(episodes))
        lanes = min(_LANES, slots)
        self.free_handles = list(range(slots))
        self.inbox: dict[int, Observation] = {}
        self.stats = RolloutStats()
        capacity = config.max_tokens + config.response_tokens
        size = -(-slots // lanes)
        self.lanes = [
            _Lane(generate.init_cache(model, size, capacity), [None] * size, np.zeros(size, bool)) for _ in range(lanes)
        ]

    def run(self) -> list[Trajectory]:
        started = time.perf_counter()
        for lane in self.lanes:
            self.admit(lane)
        while any(any(lane.rows) for lane in self.lanes):
            for lane in self.lanes:
                self.observe(lane)
                self.admit(lane)
                self.shrink(lane)
                self.act(lane)
        self.stats.seconds = time.perf_counter() - started
        return self.done

    def admit(self, lane: _Lane) -> None:
        """Gives every empty row the next episode of the queue, whose reset starts at once."""
        for row, live in enumerate(lane.rows):
            if live is not None or not self.queue or not self.free_handles:
                continue
            place, episode = self.queue.popleft()
            # Members of a group share a worker where they can: it has loaded their task already.
            handle = min(self.free_handles, key=lambda h: ((h - episode.group) % self.pool.workers, h))
            self.free_handles.remove(handle)
            self.order[handle] = place
            lane.rows[row] = _Live(episode, handle, Trajectory(task=episode.task, group=episode.group))
            lane.fresh[row] = True
            self.pool.reset(handle, episode.task)

    def observe(self, lane: _Lane) -> None:
        """Waits for the environments of a lane and turns what they say into prompts; finished episodes leave."""
        waiting = {live.handle for live in lane.rows if live is not None and not live.prompt}
        started = time.perf_counter()
        while not waiting <= self.inbox.keys():
            handle, observation = self.pool.get(timeout=None)
            self.inbox[handle] = observation
        self.stats.env_wait_seconds += time.perf_counter() - started
        for row, live in enumerate(lane.rows):
            if live is None or live.handle not in waiting:
                continue
            if self.receive(live, self.inbox.pop(live.handle)):
                self.done[self.order.pop(live.handle)] = live.trajectory
                self.free_handles.append(live.handle)
                lane.rows[row] = None

    def receive(self, live: _Live, observation: Observation) -> bool:
        """Books an observation; True when the episode is over."""
        trajectory, style = live.trajectory, self.config.style
        trajectory.observations.append(observation.text)
        trajectory.won, trajectory.score = observation.won, observation.score
        if not trajectory.actions:
            ids = self.tokenizer.first(agent.first_message(observation, style))
        else:
            trajectory.rewards.append(observation.reward)
            if observation.done:
                return True
            ids = self.tokenizer.following(agent.next_message(observation, style))
        answer = self.config.response_tokens
        full = len(trajectory.tokens) + len(ids) + answer > self.config.max_tokens
        silent = trajectory.num_policy_tokens + answer > self.config.max_policy_tokens
        if full or silent or len(trajectory.actions) == self.config.max_turns:
            trajectory.truncated = True
            return True
        live.prompt = ids
        trajectory.append_prompt(ids)
        return False

    def shrink(self, lane: _Lane) -> None:
        """Halves the lane while its live episodes fit in half of the rows and nobody is waiting for a row."""
        size = len(lane.rows)
        live = [row for row, occupant in enumerate(lane.rows) if occupant is not None]
        while not self.queue and size // 2 >= max(len(live), _SMALLEST_LANE):
            size //= 2
        if size < len(lane.rows):
            keep = (live + [row for row in range(len(lane.rows)) if row not in live])[:size]
            lane.cache = _keep_rows(lane.cache, jnp.array(keep, jnp.int32))
            lane.rows = [lane.rows[row] for row in keep]
            lane.fresh = lane.fresh[keep]

    def act(self, lane: _Lane) -> None:
        """Prefills the new prompts of a lane, decodes one turn of each, and sends the actions off."""
        rows = [(row, live) for row, live in enumerate(lane.rows) if live is not None and live.prompt]
        if not rows:
            return
        started = time.perf_counter()
        self.prefill(lane, rows)
        lane.cache.lengths.block_until_ready()
        self.stats.prefill_seconds += time.perf_counter() - started

        started = time.perf_counter()
        size = len(lane.rows)
        ints = {name: np.zeros(size, np.int32) for name in ("episode", "turn", "budget")}
        for row, live in rows:
            ints["episode"][row] = live.episode.id
            ints["turn"][row] = len(live.trajectory.actions)
            ints["budget"][row] = self.config.response_tokens
        lane.cache, sampled = generate.decode(
            self.model,
            self.params,
            lane.cache,
            self.key,
            **ints,
            temperature=np.full(size, self.temperature, np.float32),
            stop_token=np.int32(self.tokenizer.stop_id),
            block=self.config.response_tokens,
        )
        tokens, log_prob, entropy, counts = (np.asarray(a) for a in sampled)
        self.stats.decode_seconds += time.perf_counter() - started
        for row, live in rows:
            n = int(counts[row])
            ids = tokens[row, :n].tolist()
            trajectory = live.trajectory
            trajectory.append_answer(ids, log_prob[row, :n].tolist(), entropy[row, :n].tolist())
            parsed = agent.parse_action(self.tokenizer.decode(ids), tags=self.config.style == "tagged")
            trajectory.actions.append(parsed.action)
            trajectory.valid.append(parsed.valid)
            live.prompt = []
            self.pool.step(live.handle, parsed.action)
            self.stats.policy_tokens += n
            self.stats.env_steps += 1

    def prefill(self, lane: _Lane, rows: list[tuple[int, _Live]]) -> None:
        """Appends the rows' prompts to their slots, in pieces of a few fixed widths so that few programs are compiled."""
        size, start = len(lane.rows), 0
        longest = max(len(live.prompt) for _, live in rows)
        while start < longest:
            width = next((b for b in _PREFILL_BUCKETS if b >= longest - start), _PREFILL_BUCKETS[-1])
            tokens, counts = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
            for row, live in rows:
                piece = live.prompt[start : start + width]
                tokens[row, : len(piece)] = piece
                counts[row] = len(piece)
            lane.cache = generate.extend(self.model, self.params, lane.cache, tokens, counts, lane.fresh.copy())
            lane.fresh[:] = False
            self.stats.prompt_tokens += int(counts.sum())
            start += width


def collect(
    episodes: list[Episode],
    pool: EnvPool,
    tokenizer: ChatTokenizer,
    model: DecoderConfig,
    params: Params,
    key: jax.Array,
    config: RolloutConfig,
    temperature: float,
) -> tuple[list[Trajectory], RolloutStats]:
    """Plays every episode once and returns the trajectories in the order of `episodes`.

    A trajectory depends on `key`, its episode's id and task, the parameters and the temperature; not on timing, on the number
    of workers, nor on which slot it ran in (up to float reassociation in differently shaped batches).
    """
    rollout = _Rollout(episodes, pool, tokenizer, model, params, key, config, temperature)
    return rollout.run(), rollout.stats


def choose_groups(rounds: list[list[Trajectory]], groups: int) -> tuple[list[Trajectory], int]:
    """The first `groups` groups whose episodes differ in their return, of all rounds played (DAPO's dynamic sampling, arXiv
    2503.14476), numbered anew from 0; where they are too few, uniform ones fill up. Returns (trajectories, uniform groups)."""
    found = [list(g) for trajectories in rounds for _, g in itertools.groupby(trajectories, key=lambda t: t.group)]
    uniform = [len({sum(t.rewards) for t in members}) == 1 for members in found]
    kept = sorted(sorted(range(len(found)), key=uniform.__getitem__)[:groups])
    chosen = [dataclasses.replace(t, group=number) for number, i in enumerate(kept) for t in found[i]]
    return chosen, sum(uniform[i] for i in kept)
