"""Episodes as the policy saw them: exact token ids, and the statistics of the distributions sampled from."""

import dataclasses
import hashlib
import itertools

import numpy as np

from epo_jax.envs.base import Task


@dataclasses.dataclass
class Trajectory:
    """One episode as the policy saw it: the ids that it read and the ids that it emitted.

    In a run on several hosts, `goal` and `observations` are only where the episode was played. Elsewhere they are empty, and the
    lists with an element for each token are arrays.

    Attributes:
        task: the environment's task.
        goal: the task as text.
        group: index of the episode's group; the episodes of a group share a task.
        episode: the episode's id, unique in a run, which seeds its sampling.
        tokens: every token of every context, in order.
        starts: index in `tokens` of each context's first token: 0 alone for a conversation, one per turn with a window.
        turn: for each token, the turn that emitted it; -1 for tokens of prompts and observations.
        log_prob: sampler log-prob of each policy token (0 elsewhere), nats, float32.
        entropy: entropy of the distribution each policy token was sampled from (0 elsewhere), nats, float32.
        rewards: reward of each turn.
        valid: for each turn, whether its text parsed into an action; in an expert episode, whether the action is imitated.
        anchors: for each observation, 64 bits that are equal if and only if (but for chance) its text is.
        observations: text of the observation before each turn, and of the last one.
        actions: the action text of each turn.
        won: the task was completed.
        score: task progress in [0, 100].
        won_reference: as in the last `Observation`.
        truncated: ended by the turn limit or by a token limit, not by the environment.
        full: ended by a token limit: the next prompt or its answer had no room.
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
    anchors: list[int] = dataclasses.field(default_factory=list)
    observations: list[str] = dataclasses.field(default_factory=list)
    actions: list[str] = dataclasses.field(default_factory=list)
    won: bool = False
    score: float = 0.0
    won_reference: bool | None = None
    truncated: bool = False
    full: bool = False
    goal: str = ""

    def append_prompt(self, ids: list[int], new_context: bool = False) -> None:
        """Appends tokens that the policy did not emit; a new context does not attend to earlier ones."""
        if new_context or not self.starts:
            self.starts.append(len(self.tokens))
        self.tokens += ids
        self.turn += [-1] * len(ids)
        self.log_prob += [0.0] * len(ids)
        self.entropy += [0.0] * len(ids)

    def append_answer(self, ids: list[int], log_prob: list[float], entropy: list[float]) -> None:
        """Appends the tokens of the current turn's answer, with their statistics in nats."""
        self.tokens += ids
        self.turn += [len(self.actions)] * len(ids)
        self.log_prob += log_prob
        self.entropy += entropy

    def append_observation(self, text: str) -> None:
        """Appends the observation before the next turn, or after the last one."""
        self.observations.append(text)
        self.anchors.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True))

    @property
    def contexts(self) -> list[tuple[int, int]]:
        """(start, end) of each context in `tokens`."""
        return list(itertools.pairwise([*self.starts, len(self.tokens)]))

    @property
    def longest_context(self) -> int:
        return max((end - start for start, end in self.contexts), default=0)

    @property
    def num_policy_tokens(self) -> int:
        return int((np.asarray(self.turn, np.int64) >= 0).sum())


def choose_groups(rounds: list[list[Trajectory]], groups: int) -> tuple[list[Trajectory], int]:
    """Chooses `groups` groups for the update: DAPO's dynamic sampling (arXiv 2503.14476).

    Takes the first groups whose episodes differ in their return and, if they are too few, the first uniform ones. Numbers the
    groups from 0.

    Returns:
        The trajectories, and how many of the groups are uniform.
    """
    played = [list(g) for trajectories in rounds for _, g in itertools.groupby(trajectories, key=lambda t: t.group)]
    uniform = [len({sum(t.rewards) for t in group}) == 1 for group in played]
    kept = sorted(sorted(range(len(played)), key=uniform.__getitem__)[:groups])
    chosen = [dataclasses.replace(t, group=number) for number, i in enumerate(kept) for t in played[i]]
    return chosen, sum(uniform[i] for i in kept)
