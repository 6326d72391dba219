"""Episodes as the policy saw them (`Trajectory`), and how they are packed into the learner's rows."""

import dataclasses
import itertools

import numpy as np

from epo_jax.envs.base import Task
from epo_jax.objectives.batch import TokenBatch


@dataclasses.dataclass
class Trajectory:
    """One episode as the policy saw it: token in, token out.

    Attributes:
        task: the environment's task.
        goal: the task in words.
        group: index of the group (same task) that the episode belongs to.
        episode: the episode's id, from which its tokens were drawn; no other episode of the run has it.
        tokens: every token of every context, in order.
        starts: where in `tokens` each context begins: 0 alone for a conversation, one for each turn with a window.
        turn: for each token, the turn that emitted it; -1 for tokens of prompts and observations.
        log_prob: behaviour log-probability of each policy token (0 elsewhere), nats, float32.
        entropy: entropy of the distribution each policy token was sampled from (0 elsewhere), nats, float32.
        rewards: reward of each turn.
        valid: for each turn, whether its text parsed into an action; of an expert's, whether it is for imitation.
        observations: the observation before each turn, and the last one (for readers and step-level grouping).
        actions: the action text of each turn.
        won: the task was completed.
        score: task progress in [0, 100].
        truncated: ended by the turn limit or the token budget rather than by the environment.
        full: ended by the token budget, as what came next had no room.
    """

    task: Task
    group: int = 0
    episode: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    starts: list[int] = dataclasses.field(default_factory=list)
    turn: list[int] = dataclasses.field(default_factory=list)
    log_prob: list[float] = dataclasses.field(default_factory=list)
    entropy: list[float] = dataclasses.field(default_factory=list)
    rewards: list[float] = dataclasses.field(default_factory=list)
    valid: list[bool] = dataclasses.field(default_factory=list)
    observations: list[str] = dataclasses.field(default_factory=list)
    actions: list[str] = dataclasses.field(default_factory=list)
    won: bool = False
    score: float = 0.0
    truncated: bool = False
    full: bool = False
    goal: str = ""

    def append_prompt(self, ids: list[int], new_context: bool = False) -> None:
        """Appends tokens that the policy did not emit; what follows does not see what came before a new context."""
        if new_context or not self.starts:
            self.starts.append(len(self.tokens))
        self.tokens += ids
        self.turn += [-1] * len(ids)
        self.log_prob += [0.0] * len(ids)
        self.entropy += [0.0] * len(ids)

    def append_answer(self, ids: list[int], log_prob: list[float], entropy: list[float]) -> None:
        self.tokens += ids
        self.turn += [len(self.actions)] * len(ids)
        self.log_prob += log_prob
        self.entropy += entropy

    @property
    def contexts(self) -> list[tuple[int, int]]:
        """(start, end) of each context in `tokens`."""
        return list(itertools.pairwise([*self.starts, len(self.tokens)]))

    @property
    def longest_context(self) -> int:
        return max((end - start for start, end in self.contexts), default=0)

    @property
    def num_policy_tokens(self) -> int:
        return sum(t >= 0 for t in self.turn)


def entropy_by_turn(trajectories: list[Trajectory]) -> dict[int, float]:
    """Mean entropy, nats, of the policy tokens of each turn that was played."""
    turn = np.concatenate([np.asarray(t.turn, np.int64) for t in trajectories])
    entropy = np.concatenate([np.asarray(t.entropy) for t in trajectories])[turn >= 0]
    turn = turn[turn >= 0]
    totals, counts = np.bincount(turn, entropy), np.bincount(turn)
    return {int(t): float(totals[t] / counts[t]) for t in np.flatnonzero(counts)}


def first_fit(sizes: list[tuple[int, int]], capacity: tuple[int, int]) -> list[list[int]]:
    """Packs items of (tokens, policy tokens) into bins of `capacity`, largest first, each into the first bin with room."""
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


def pack(
    trajectories: list[Trajectory],
    row_tokens: int,
    row_policy_tokens: int,
    max_turns: int,
    mini_batches: int = 1,
    rows_multiple: int = 1,
    order: np.ndarray | None = None,
    contexts: int = 1,
    contexts_per_row: int = 1,
    seed: int = 0,
) -> TokenBatch:
    """Packs trajectories into a `TokenBatch` whose shapes depend on the arguments alone, never on the lengths.

    Args:
        trajectories: at most `row_tokens` tokens and `row_policy_tokens` policy tokens in each context.
        row_tokens: T.
        row_policy_tokens: P.
        max_turns: U.
        mini_batches: M; the trajectories are dealt to them in `order`, all contexts of one together.
        rows_multiple: R is a multiple of this (the micro-batch size).
        order: a permutation of the trajectories, or [E, N] one for each of E epochs, whose mini-batches then follow one
            another; as given when None.
        contexts: most contexts of a trajectory.
        contexts_per_row: contexts that fit in a row however long they are.
        seed: see `TokenBatch`.
    """
    n = len(trajectories)
    per_mini = -(-n // mini_batches)
    orders = np.atleast_2d(np.arange(n) if order is None else order)
    dealt = [order[m * per_mini : (m + 1) * per_mini] for order in orders for m in range(mini_batches)]
    # First fit opens a row only when each other row holds at least `contexts_per_row`.
    num_rows = -(-per_mini * contexts // (contexts_per_row * rows_multiple)) * rows_multiple
    wide, narrow = (len(dealt), num_rows, row_tokens), (len(dealt), num_rows, row_policy_tokens)
    ints = {k: np.zeros(wide, np.int32) for k in ("tokens", "positions", "segment_ids")}
    ints |= {k: np.zeros(narrow, np.int32) for k in ("index", "label", "trajectory", "turn")}
    floats = {
        k: np.zeros(narrow, np.float32)
        for k in ("policy_mask", "reward", "valid", "behaviour_log_prob", "behaviour_entropy")
    }
    rows = np.zeros((len(dealt),), np.int32)
    anchor, seen = np.zeros((n, max_turns), np.int32), {}
    for i, trajectory in enumerate(trajectories):
        for u, observation in enumerate(trajectory.observations[: len(trajectory.actions)]):
            anchor[i, u] = seen.setdefault((trajectory.group, observation), len(seen))
    for m, indices in enumerate(dealt):
        members = [(i, slice(start, end)) for i in map(int, indices) for start, end in trajectories[i].contexts]
        turns = [np.asarray(trajectories[i].turn[of], np.int64) for i, of in members]
        sizes = [(len(turn), int((turn >= 0).sum())) for turn in turns]
        bins = first_fit(sizes, (row_tokens, row_policy_tokens))
        rows[m] = len(bins)
        for r, content in enumerate(bins):
            start = policy_start = 0
            for segment, j in enumerate(content, start=1):
                (i, of), turn = members[j], turns[j]
                t = trajectories[i]
                length = len(turn)
                span = (m, r, slice(start, start + length))
                ints["tokens"][span] = t.tokens[of]
                ints["positions"][span] = np.arange(length)
                ints["segment_ids"][span] = segment
                where = np.flatnonzero(turn >= 0)
                last_of_turn = np.append(turn[where][1:] != turn[where][:-1], True)
                policy_span = (m, r, slice(policy_start, policy_start + len(where)))
                ints["index"][policy_span] = start + where - 1
                ints["label"][policy_span] = np.asarray(t.tokens[of], np.int64)[where]
                ints["trajectory"][policy_span] = i
                ints["turn"][policy_span] = turn[where]
                floats["policy_mask"][policy_span] = 1.0
                floats["reward"][policy_span] = np.asarray(t.rewards)[turn[where]] * last_of_turn
                floats["valid"][policy_span] = np.asarray(t.valid)[turn[where]]
                floats["behaviour_log_prob"][policy_span] = np.asarray(t.log_prob[of])[where]
                floats["behaviour_entropy"][policy_span] = np.asarray(t.entropy[of])[where]
                start += length
                policy_start += len(where)
    return TokenBatch(
        **ints,
        **floats,
        rows=rows,
        returns=np.array([sum(t.rewards) for t in trajectories], np.float32),
        group=np.array([t.group for t in trajectories], np.int32),
        anchor=anchor,
        episode=np.array([t.episode for t in trajectories], np.int32),
        seed=np.array(seed, np.uint32),
    )
