"""One episode as a state machine: observations and sampled tokens in, turns and actions out.

    reset -> on_observation -> next_turn -> on_tokens -> (action) -> on_observation -> ... -> ended
                                   ^______________| the turn goes on in the next block

Plain Python: no JAX, no model, no environment process. The scheduler moves what comes out to where it goes in.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from epo_jax.envs import agent
from epo_jax.envs.base import Observation, Task
from epo_jax.rollout.prompts import RolloutConfig, next_prompt
from epo_jax.rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from epo_jax.models.tokenizer import ChatTokenizer


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode to play: `id` seeds its sampling, episodes of one `group` share a task."""

    id: int
    task: Task
    group: int = 0


class Turn(NamedTuple):
    """What a row does next: append `prompt`, then sample up to `budget` tokens.

    Attributes:
        prompt: ids that the cache does not hold yet.
        fresh: the row is emptied first.
        episode, turn, position: `position` tokens of turn `turn` of episode `episode` are sampled already; the three seed the
            sampling.
    """

    prompt: list[int]
    fresh: bool
    episode: int
    turn: int
    position: int
    budget: int


class Answer(NamedTuple):
    """Sampled ids, and for each its log-probability and the entropy of its distribution, nats."""

    tokens: list[int]
    log_prob: list[float]
    entropy: list[float]


class LiveEpisode:
    """An episode that is being played.

    Attributes:
        trajectory: what happened so far; complete once `ended`.
        ended: by the environment, by the turn limit, or because the next turn has no room.
        lacking: tokens of the first prompt and its answer, if they do not fit in a context; else 0.
    """

    def __init__(self, episode: Episode, tokenizer: ChatTokenizer, config: RolloutConfig):
        self.episode, self.tokenizer, self.config = episode, tokenizer, config
        self.trajectory = Trajectory(task=episode.task, group=episode.group, episode=episode.id)
        self.ended = False
        self.lacking = 0
        self._first: Observation | None = None
        self._unread: list[int] = []  # empty while the episode waits for an observation
        self._fresh = True
        self._answer = Answer([], [], [])
        self._policy_tokens = 0

    @property
    def turn_budget(self) -> int:
        """Most tokens of the current turn's answer."""
        return self.config.response_tokens

    def next_turn(self) -> Turn | None:
        """What to read and sample next; None while the episode waits for an observation."""
        if not self._unread:
            return None
        sampled = len(self._answer.tokens)
        budget = min(self.turn_budget - sampled, self.config.block)
        return Turn(self._unread, self._fresh, self.episode.id, len(self.trajectory.actions), sampled, budget)

    def on_tokens(self, sampled: Answer) -> str | None:
        """Appends a block of sampled tokens to the answer; returns the action if they end the turn."""
        self._answer.tokens.extend(sampled.tokens)
        self._answer.log_prob.extend(sampled.log_prob)
        self._answer.entropy.extend(sampled.entropy)
        self._policy_tokens += len(sampled.tokens)
        # The last token is sampled, but the cache does not hold it yet.
        tokens = self._answer.tokens
        self._unread, self._fresh = tokens[-1:], False
        if tokens[-1] not in self.tokenizer.stop_ids and len(tokens) < self.turn_budget:
            return None
        opened = self.tokenizer.frame.opened
        action, valid = agent.parse_action(self.tokenizer.decode(tokens), self.config.style == "tagged", opened)
        self.trajectory.append_answer(*self._answer)
        self.trajectory.actions.append(action)
        self.trajectory.valid.append(valid)
        self._answer, self._unread = Answer([], [], []), []
        return action

    def on_observation(self, observation: Observation) -> None:
        """Records an observation, then ends the episode or prepares its next turn."""
        trajectory, config = self.trajectory, self.config
        history = list(zip(trajectory.observations, trajectory.actions, strict=True))
        trajectory.append_observation(observation.text)
        trajectory.won, trajectory.score = observation.won, observation.score
        trajectory.won_reference = observation.won_reference
        if history:
            trajectory.rewards.append(observation.reward)
            if observation.done:
                self.ended = True
                return
        else:
            self._first = observation
            trajectory.goal = observation.goal
        last = trajectory.tokens[-1] if history else None
        prompt = next_prompt(self.tokenizer, config, self._first, history, observation, last)
        fresh = config.window is not None or not history
        context = len(prompt) + config.response_tokens + (0 if fresh else len(trajectory.tokens))
        full = context > config.max_tokens
        spent = self._policy_tokens + config.response_tokens > config.max_policy_tokens
        if full or spent or len(history) == config.max_turns:
            self.ended = trajectory.truncated = True
            trajectory.full = full or spent
            self.lacking = context if full and not history else 0
            return
        # The cache does not hold the token that ended the last turn.
        self._unread, self._fresh = (prompt if fresh else [last, *prompt]), fresh
        trajectory.append_prompt(prompt, new_context=fresh)
