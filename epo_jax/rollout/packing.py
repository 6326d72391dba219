"""Trajectories packed into the learner's rows: a `TokenBatch` of fixed shape."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from epo_jax.objectives.batch import TokenBatch
from epo_jax.rollout.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The sizes that fix the shapes of a `TokenBatch`, whatever the lengths of the trajectories.

    Attributes:
        row_tokens: T, tokens of a row; no context is longer.
        policy_tokens: P, policy tokens of a row; no context has more.
        max_turns: U, turns of a trajectory.
        mini_batches: of one epoch; by turn, the most that there can be.
        rows_multiple: R, rows of a mini-batch, is a multiple of this (the rows of a micro-batch).
        contexts: most contexts of a trajectory.
        contexts_per_row: contexts that fit in a row however long they are.
        mini_turns: turns of a mini-batch, for mini-batches by turn; 0: each has as many trajectories.
    """

    row_tokens: int
    policy_tokens: int
    max_turns: int
    mini_batches: int = 1
    rows_multiple: int = 1
    contexts: int = 1
    contexts_per_row: int = 1
    mini_turns: int = 0

    def rows(self, trajectories: int) -> int:
        """R for so many trajectories: first fit opens a row only if all others hold at least `contexts_per_row` contexts."""
        contexts = -(-trajectories // self.mini_batches) * self.contexts
        if self.mini_turns:  # each context of a mini-batch has a turn
            contexts = min(trajectories * self.contexts, self.mini_turns)
        return -(-contexts // (self.contexts_per_row * self.rows_multiple)) * self.rows_multiple


def pack(
    trajectories: list[Trajectory],
    shape: BatchShape,
    orders: np.ndarray | None = None,
    seed: int = 0,
    own_rows: Collection[int] | None = None,
) -> TokenBatch:
    """Packs trajectories into rows; all contexts of a trajectory are in one mini-batch, unless mini-batches are by turn.

    Args:
        orders: permutations of the trajectories, [N] or one for each epoch [E, N]. Each is cut into mini-batches, and the
            mini-batches of the epochs follow one another. None keeps the order of `trajectories`.
        seed: the run's, from which the learner draws.
        own_rows: the rows of each mini-batch to fill, those on this process's devices; the others stay 0. None fills all.
    """
    plan = _plan(trajectories, shape, orders)
    size = len(plan), shape.rows(len(trajectories))
    wide, narrow = (*size, shape.row_tokens), (*size, shape.policy_tokens)
    arrays = {name: np.zeros(wide, np.int32) for name in ("tokens", "positions", "segment_ids")}
    arrays |= {name: np.zeros(narrow, np.int32) for name in ("index", "label", "trajectory", "turn")}
    arrays |= {name: np.zeros(narrow, np.float32) for name in ("policy_mask", "reward", "valid", *_RECORDED)}
    columns = functools.cache(lambda i: _columns(trajectories[i]))
    for m, rows in enumerate(plan):
        for r, contexts in enumerate(rows):
            if own_rows is None or r in own_rows:
                for name, values in _row(contexts, columns).items():
                    arrays[name][m, r, : len(values)] = values
    return TokenBatch(
        **arrays,
        rows=np.array([len(rows) for rows in plan], np.int32),
        returns=np.array([sum(t.rewards) for t in trajectories], np.float32),
        group=np.array([t.group for t in trajectories], np.int32),
        anchor=_anchors(trajectories, shape.max_turns),
        episode=np.array([t.episode for t in trajectories], np.int32),
        seed=np.array(seed, np.uint32),
    )


class _Context(NamedTuple):
    """Tokens `start` to `end` of the trajectory with index `owner`; `policy_tokens` of them are the policy's, of
    `turns` turns."""

    owner: int
    start: int
    end: int
    policy_tokens: int
    turns: int


def _plan(trajectories: list[Trajectory], shape: BatchShape, orders: np.ndarray | None) -> list[list[list[_Context]]]:
    """The contexts in each row of each mini-batch, the same plan in every process."""
    contexts = [_contexts(i, trajectory) for i, trajectory in enumerate(trajectories)]
    plan = []
    for order in np.atleast_2d(np.arange(len(trajectories)) if orders is None else orders):
        for mini_batch in _mini_batches([contexts[i] for i in order], shape):
            sizes = [(context.end - context.start, context.policy_tokens) for context in mini_batch]
            bins = first_fit(sizes, (shape.row_tokens, shape.policy_tokens))
            plan.append([[mini_batch[c] for c in content] for content in bins])
    return plan


def _contexts(owner: int, trajectory: Trajectory) -> list[_Context]:
    found, turn = [], np.asarray(trajectory.turn, np.int64)
    for start, end in trajectory.contexts:
        emitted = turn[start:end][turn[start:end] >= 0]
        found.append(_Context(owner, start, end, emitted.size, np.unique(emitted).size))
    return found


def _mini_batches(trajectories: list[list[_Context]], shape: BatchShape) -> list[list[_Context]]:
    """The contexts of each mini-batch, from those of each trajectory in the order in which they are cut."""
    if shape.mini_turns:
        contexts = sum(trajectories, [])
        cut = cut_by_turn([context.turns for context in contexts], shape.mini_turns)
        return [[contexts[c] for c in cut[m]] if m < len(cut) else [] for m in range(shape.mini_batches)]
    share = -(-len(trajectories) // shape.mini_batches)
    return [sum(trajectories[m * share : (m + 1) * share], []) for m in range(shape.mini_batches)]


def cut_by_turn(turns: list[int], most: int) -> list[list[int]]:
    """Cuts contexts with so many turns each into mini-batches of `most` turns or less, as few and as equal as possible.

    The indices of each mini-batch's contexts, in order. A context of several turns, a whole conversation, is in the mini-batch
    of its middle, so that sizes are exact for contexts of one turn and else differ from `most` by less than a conversation.
    """
    if not turns:
        return []
    counted = np.maximum(turns, 1)  # an episode that ended before its first answer
    ends = np.cumsum(counted)
    number = -(-int(ends[-1]) // most)
    place = (2 * ends - counted) * number // (2 * ends[-1])
    return [np.flatnonzero(place == m).tolist() for m in range(number)]


# The sampler's statistics: array of the batch -> field of a trajectory.
_RECORDED = {"behaviour_log_prob": "log_prob", "behaviour_entropy": "entropy"}


def _columns(trajectory: Trajectory) -> dict[str, np.ndarray]:
    """What the batch holds of each token of a trajectory."""
    turn = np.asarray(trajectory.turn, np.int64)
    ends_turn = (turn >= 0) & (np.append(turn[1:], -1) != turn)
    # Turn -1, of tokens that the policy did not emit, takes the last element.
    rewards, valid = np.append(trajectory.rewards, 0.0), np.append(trajectory.valid, False)
    columns = {"tokens": np.asarray(trajectory.tokens, np.int64), "turn": turn}
    columns |= {"reward": rewards[turn] * ends_turn, "valid": valid[turn]}
    return columns | {name: np.asarray(getattr(trajectory, field)) for name, field in _RECORDED.items()}


def _row(contexts: list[_Context], columns: Callable[[int], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of one row, without padding; `columns(i)` gives those of trajectory i."""
    lengths = [context.end - context.start for context in contexts]
    pieces = [{name: values[c.start : c.end] for name, values in columns(c.owner).items()} for c in contexts]
    token = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    emitted = np.flatnonzero(token["turn"] >= 0)
    policy = {name: values[emitted] for name, values in token.items()}
    return {
        "tokens": token["tokens"],
        "positions": np.concatenate([np.arange(length) for length in lengths]),
        "segment_ids": np.repeat(np.arange(1, len(contexts) + 1), lengths),
        "index": emitted - 1,
        "label": policy.pop("tokens"),
        "trajectory": np.repeat([context.owner for context in contexts], lengths)[emitted],
        "policy_mask": np.ones(len(emitted)),
        **policy,
    }


def _anchors(trajectories: list[Trajectory], max_turns: int) -> np.ndarray:
    """An id of the observation before each turn, equal within a group if the observations are, [N, U]."""
    anchor, ids = np.zeros((len(trajectories), max_turns), np.int32), {}
    for i, trajectory in enumerate(trajectories):
        for turn, observation in enumerate(trajectory.anchors[: len(trajectory.actions)]):
            anchor[i, turn] = ids.setdefault((trajectory.group, observation), len(ids))
    return anchor


def first_fit(sizes: list[tuple[int, int]], capacity: tuple[int, int]) -> list[list[int]]:
    """Packs items of (tokens, policy tokens) into bins of `capacity`: largest first, each into the first bin with room."""
    bins: list[list[int]] = []
    room: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], i)):
        tokens, policy = sizes[item]
        for content, left in zip(bins, room, strict=True):
            if left[0] >= tokens and left[1] >= policy:
                content.append(item)
                left[0] -= tokens
                left[1] -= policy
                break
        else:
            bins.append([item])
            room.append([capacity[0] - tokens, capacity[1] - policy])
    return bins
