"""Metrics of an RL step that the host computes from its episodes: spread of entropy, collapse of the actions.

All entropies of tokens are those of the distributions sampled from, in nats. A metric without anything to measure is None.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from epo_jax.rollout.trajectory import Trajectory

# Turns at either end of an episode that `early_and_late_entropy` averages over.
END_TURNS = 10


class PolicyTokens(NamedTuple):
    """The policy tokens of some episodes, [P]: entropy in nats, turn, index of the episode, and how many turns that has."""

    entropy: np.ndarray
    turn: np.ndarray
    episode: np.ndarray
    turns: np.ndarray


def policy_tokens(trajectories: Sequence[Trajectory]) -> PolicyTokens:
    """The policy tokens of all episodes, one after another."""
    turn = np.concatenate([np.asarray(t.turn, np.int64) for t in trajectories])
    entropy = np.concatenate([np.asarray(t.entropy, np.float64) for t in trajectories])
    lengths = [len(t.turn) for t in trajectories]
    episode = np.repeat(np.arange(len(trajectories)), lengths)
    turns = np.repeat([len(t.actions) for t in trajectories], lengths)
    emitted = turn >= 0
    return PolicyTokens(entropy[emitted], turn[emitted], episode[emitted], turns[emitted])


def entropy_by_turn(tokens: PolicyTokens) -> dict[int, float]:
    """Mean entropy of the policy tokens of each turn, nats."""
    totals, counts = np.bincount(tokens.turn, tokens.entropy), np.bincount(tokens.turn)
    return {int(t): float(totals[t] / counts[t]) for t in np.flatnonzero(counts)}


def early_and_late_entropy(tokens: PolicyTokens) -> dict[str, float | None]:
    """Mean entropy of the policy tokens in the first and in the last `END_TURNS` turns of their episodes, nats.

    An episode of at most so many turns counts whole in both.
    """
    return {
        "entropy_first_turns": _mean(tokens.entropy[tokens.turn < END_TURNS]),
        "entropy_last_turns": _mean(tokens.entropy[tokens.turn >= tokens.turns - END_TURNS]),
    }


def entropy_spread(tokens: PolicyTokens) -> dict[str, float | None]:
    """Standard deviation (divisor n) of the entropies of tokens, and of the mean entropies of episodes, nats."""
    totals, counts = np.bincount(tokens.episode, tokens.entropy), np.bincount(tokens.episode)
    episodes = totals[counts > 0] / counts[counts > 0]
    return {"entropy_std_tokens": _std(tokens.entropy), "entropy_std_episodes": _std(episodes)}


def action_information(trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    """H(Z|X) and I(X;Z) of the first action Z and the task X, nats: the two measures of collapse of arXiv 2604.06268.

    Both come from counts, with the correction of `sample_entropy`; H(Z|X) is the mean over tasks, each with the weight of its
    episodes, and I(X;Z) = H(Z) - H(Z|X), which the correction can make slightly negative. A task that was played once does not
    show what else could have been done, and is left out.
    """
    first: dict[str, list[str]] = {}
    for t in trajectories:
        if t.actions:
            first.setdefault(t.task["id"], []).append(t.actions[0])
    several = [actions for actions in first.values() if len(actions) > 1]
    if not several:
        return {"action_entropy_given_task": None, "task_action_information": None}
    given = sum(len(actions) * sample_entropy(actions) for actions in several) / sum(map(len, several))
    whole = sample_entropy([action for actions in several for action in actions])
    return {"action_entropy_given_task": given, "task_action_information": whole - given}


def sample_entropy(sample: Sequence[str]) -> float:
    """Entropy in nats from a sample of n with m distinct values: that of the shares, plus (m - 1) / 2n (Miller and Madow)."""
    size, counts = len(sample), Counter(sample).values()
    return -sum(n / size * math.log(n / size) for n in counts) + (len(counts) - 1) / (2 * size)


def repeated_actions(trajectories: Sequence[Trajectory]) -> float | None:
    """Share of turns whose action the episode had taken in an earlier turn; a turn without an action repeats nothing."""
    repeated = [action != "" and action in t.actions[:u] for t in trajectories for u, action in enumerate(t.actions)]
    return _mean(repeated)


def _mean(values) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _std(values) -> float | None:
    return float(np.std(values)) if len(values) else None
