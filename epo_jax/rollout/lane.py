"""A lane: rows of one cache that are prefilled and decoded together, in shapes from a small table.

What a lane computes depends on its turns alone, so two plays of the same turns agree bit for bit.
"""

import functools
import itertools
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from epo_jax.models import generate, members
from epo_jax.models.decoder import DecoderConfig, Params
from epo_jax.models.members import Members
from epo_jax.parallel import mesh
from epo_jax.rollout.episode import Answer, Turn
from epo_jax.rollout.prompts import SamplingConfig

# Every compiled shape is a choice from these: columns of an extend; tokens of a row's capacity, which doubles; and rows, all of
# the lane's or a quarter of them, where a lane halves its rows down to the smallest. One column is for an answer that goes on
# in the next block.
WIDTHS = (1, 16, 64, 256, 1024)
SMALLEST_CAPACITY = 256
SMALLEST_LANE = 4

# A call of a compiled program costs about as much as this many tokens more.
_CALL_TOKENS = 64


class Programs:
    """Lets threads call compiled functions in parallel, but a new shape one at a time, so that it is compiled once."""

    def __init__(self):
        self._known: set[Hashable] = set()
        self._lock = threading.Lock()

    def call(self, shape: Hashable, function: Callable, *args, **kwargs):
        if shape in self._known:
            return function(*args, **kwargs)
        with self._lock:
            result = function(*args, **kwargs)
            self._known.add(shape)
            return result


class Sampler(NamedTuple):
    """How every row samples; a call of `decode` samples at most `block` tokens. Several members have a key each."""

    key: jax.Array
    stop_tokens: tuple[int, ...]
    sampling: SamplingConfig
    block: int


class Lane:
    """Rows of a cache: `size` for each member, until `keep` reduces them. Row r belongs to member r // size.

    A lane of one policy has one member. If `params` are `Members`, every program is mapped over them.

    Args:
        cache_dtype: "int8", or None for the compute dtype.
        on: the mesh whose devices share the rows; each has the weights, or its part of them along "tensor".

    Attributes:
        members: number of members.
        prefill_seconds, decode_seconds: wall time so far.
        prompt_tokens: tokens read so far; a prompt that rows share counts once.
    """

    def __init__(
        self,
        model: DecoderConfig,
        params: Params | Members,
        size: int,
        max_tokens: int,
        sampler: Sampler,
        programs: Programs,
        cache_dtype: str | None = None,
        on: jax.sharding.Mesh | None = None,
    ):
        self._cache_dtype, self._on = cache_dtype, on
        self._model, self._params, self._sampler, self._programs = model, params, sampler, programs
        self.members = params.count if isinstance(params, Members) else 1
        self._compute = members if isinstance(params, Members) else generate
        self._lead = (self.members,) if isinstance(params, Members) else ()
        self._max_tokens = max_tokens
        self._cache: generate.Cache | None = None
        self._capacity = 0
        self._lengths = np.zeros(self.members * size, np.int64)
        self.size = size
        self.prefill_seconds = self.decode_seconds = 0.0
        self.prompt_tokens = 0

    def keep(self, rows: list[int]) -> None:
        """Keeps only these rows, the same number for each member, in this order."""
        if self._cache is not None:
            self._cache = self._take(rows, self._capacity)
        self._lengths, self.size = self._lengths[rows], len(rows) // self.members

    def play(self, turns: dict[int, Turn]) -> dict[int, Answer]:
        """Reads the prompt of every row's turn and samples its answer, or one block of it."""
        started = time.perf_counter()
        for row, turn in turns.items():
            if turn.fresh:
                self._lengths[row] = 0
        self._make_room(max(self._lengths[row] + len(turn.prompt) + turn.budget for row, turn in turns.items()))
        self._prefill(turns)
        self._cache.lengths.block_until_ready()
        prefilled = time.perf_counter()
        answers = self._decode(turns)
        self.prefill_seconds += prefilled - started
        self.decode_seconds += time.perf_counter() - prefilled
        return answers

    def _call(self, function, *args, shape=(), **kwargs):
        key = function, self.members, self.size, self._capacity, shape
        with mesh.inside(self._on):
            return self._programs.call(key, function, *args, **kwargs)

    def _take(self, rows: list[int], capacity: int) -> generate.Cache:
        of_members = np.asarray(rows, np.int32).reshape(*self._lead, -1) % self.size
        shape = len(rows), capacity
        return self._placed(self._call(self._compute.take_slots, self._cache, of_members, capacity, shape=shape))

    def _placed(self, cache: generate.Cache) -> generate.Cache:
        if self._on is None:
            return cache
        return jax.device_put(cache, mesh.shardings(self._on, cache, generate.cache_axes(cache)))

    def _make_room(self, tokens: int) -> None:
        capacity = capacity_for(tokens, self._max_tokens)
        if self._cache is None:
            shape = *self._lead, self.size, capacity
            self._cache = self._placed(self._compute.init_cache(self._model, *shape, self._cache_dtype))
        elif capacity > self._capacity:
            self._cache = self._take(list(range(len(self._lengths))), capacity)
        self._capacity = max(self._capacity, capacity)

    def _prefill(self, turns: dict[int, Turn]) -> None:
        """Appends the prompts. If rows of a member start with the same prompt, one reads it and the others copy it."""
        first, source = {}, {}
        for row, turn in turns.items():
            reader = first.setdefault((row // self.size, *turn.prompt), row) if turn.fresh else row
            if reader != row:
                source[row] = reader
        readers = {row: turn for row, turn in turns.items() if row not in source}
        start = 0
        for width in pieces(self._longest({row: len(turn.prompt) for row, turn in readers.items()}), self.size):
            unread = [row for row, turn in readers.items() if len(turn.prompt) > start]
            self._extend(unread, readers, start, width)
            start += width
        if source:
            self._share(source, max(len(turns[row].prompt) for row in source))
        for row, turn in turns.items():
            self._lengths[row] += len(turn.prompt)

    def _share(self, source: dict[int, int], tokens: int) -> None:
        """Copies the first `tokens` tokens of row source[r] to row r."""
        by_member = self._by_member(source)
        shape = self.members, _rows_for(max(map(len, by_member)), self.size)
        targets, sources = np.full(shape, self.size, np.int32), np.zeros(shape, np.int32)
        for member, rows in enumerate(by_member):
            targets[member, : len(rows)] = [row % self.size for row in rows]
            sources[member, : len(rows)] = [source[row] % self.size for row in rows]
        sources, targets = (x.reshape(*self._lead, -1) for x in (sources, targets))
        columns = capacity_for(tokens, self._capacity)
        copied = self._call(self._compute.copy_slots, self._cache, sources, targets, columns, shape=(shape[1], columns))
        self._cache = self._placed(copied)

    def _by_member(self, rows: Iterable[int]) -> list[list[int]]:
        return [[row for row in rows if row // self.size == member] for member in range(self.members)]

    def _longest(self, lengths: dict[int, int]) -> tuple[int, ...]:
        """In ascending order: the longest prompt of any member, the longest of their second longest, and so on."""
        ranked = [
            sorted((n for row, n in lengths.items() if row // self.size == member), reverse=True)
            for member in range(self.members)
        ]
        return tuple(sorted(max(same_rank) for same_rank in itertools.zip_longest(*ranked, fillvalue=0)))

    def _extend(self, rows: list[int], turns: dict[int, Turn], start: int, width: int) -> None:
        """Appends the tokens from `start` to `start` + `width` of these rows' prompts."""
        by_member = self._by_member(rows)
        count = _rows_for(max(map(len, by_member)), self.size)
        chosen = count < self.size
        shape = self.members, count
        indices = np.full(shape, self.size, np.int32)
        tokens, counts, fresh = np.zeros((*shape, width), np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
        for member, of_member in enumerate(by_member):
            for i, row in enumerate(of_member):
                index = row % self.size
                at = member, i if chosen else index
                piece = turns[row].prompt[start : start + width]
                tokens[at][: len(piece)], counts[at], indices[at] = piece, len(piece), index
                fresh[at] = turns[row].fresh and start == 0
        arguments = (tokens, counts, fresh, indices) if chosen else (tokens, counts, fresh)
        arguments = [x.reshape(*self._lead, *x.shape[1:]) for x in arguments]
        self._cache = self._call(self._compute.extend, self._model, self._params, self._cache, *arguments, shape=(count, width))
        self.prompt_tokens += int(counts.sum())

    def _decode(self, turns: dict[int, Turn]) -> dict[int, Answer]:
        sampler, size = self._sampler, self.size
        ints = {name: np.zeros(len(self._lengths), np.int32) for name in ("episode", "turn", "position", "budget")}
        for row, turn in turns.items():
            for name, values in ints.items():
                values[row] = getattr(turn, name)
        ints = {name: values.reshape(*self._lead, size) for name, values in ints.items()}
        sampling = generate.Sampling(
            np.full(size, sampler.sampling.temperature, np.float32),
            np.full(size, sampler.sampling.top_k, np.int32),
            np.full(size, sampler.sampling.top_p, np.float32),
        )
        self._cache, sampled = self._call(
            self._compute.decode, self._model, self._params, self._cache, sampler.key, **ints, sampling=sampling,
            stop_tokens=np.asarray(sampler.stop_tokens, np.int32), block=sampler.block,
        )  # fmt: skip
        tokens, log_prob, entropy, counts = (np.asarray(a).reshape(-1, *a.shape[len(self._lead) + 1 :]) for a in sampled)
        answers = {}
        for row in turns:
            n = int(counts[row])
            self._lengths[row] += n - 1  # the last token is read with the next prompt
            answers[row] = Answer(*(a[row, :n].tolist() for a in (tokens, log_prob, entropy)))
        return answers


def capacity_for(tokens: int, most: int) -> int:
    """The smallest capacity of the table that holds `tokens`: doubling up to `most`."""
    capacity = SMALLEST_CAPACITY
    while capacity < tokens:
        capacity *= 2
    return min(capacity, most)


def _rows_for(count: int, size: int) -> int:
    """Rows that are computed for `count` rows with new tokens: a quarter of the lane if that is enough."""
    return size // 4 if 0 < count <= size // 4 else size


@functools.lru_cache(maxsize=4096)
def pieces(lengths: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The widths of successive extends that read prompts of these lengths at the least cost.

    Each extend reads the next columns of every prompt that is not read to its end, a few long prompts in a quarter of the rows.
    A dynamic program over the column at which an extend starts finds the widths. With windows, one power of two that holds the
    longest prompt makes a rollout take a third longer than these widths do (docs/rollout.md).

        lengths 9, 10, ..., 10, 20 in a lane of 16: 16 columns of all rows and 16 more of four
    """
    longest = max(lengths, default=0)
    best: dict[int, tuple[int, tuple[int, ...]]] = {}

    def cheapest(start: int) -> tuple[int, tuple[int, ...]]:
        if start >= longest:
            return 0, ()
        if start not in best:
            rows = _rows_for(sum(n > start for n in lengths), size)
            widths = WIDTHS[1:] if start else WIDTHS  # one column comes first or never
            enough = next((i for i, width in enumerate(widths) if width >= longest - start), len(widths) - 1)
            options = []
            for width in widths[: enough + 1]:
                cost, rest = cheapest(start + width)
                options.append((cost + rows * width + _CALL_TOKENS, (width, *rest)))
            best[start] = min(options)
        return best[start]

    # From the end backwards, so that a long prompt does not recurse deeply.
    for start in range(longest - longest % WIDTHS[1], 0, -WIDTHS[1]):
        cheapest(start + 1)
        cheapest(start)
    return cheapest(0)[1]


def most_programs(size: int, max_tokens: int) -> int:
    """Upper bound on the programs of a lane of `size` rows for reading and sampling; copying rows takes a few small ones."""
    sizes, capacities = [size], {capacity_for(n, max_tokens) for n in range(1, max_tokens + 1)}
    while sizes[-1] // 2 >= SMALLEST_LANE:
        sizes.append(sizes[-1] // 2)
    widths = [w for i, w in enumerate(WIDTHS) if i == 0 or WIDTHS[i - 1] < max_tokens]
    return len(sizes) * len(capacities) * (1 + 2 * len(widths))
