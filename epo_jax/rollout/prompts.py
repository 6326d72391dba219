"""The settings of a rollout, and the prompts that sampling and behavior cloning share."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from epo_jax.common.errors import UserError
from epo_jax.envs import agent
from epo_jax.envs.base import Observation

if TYPE_CHECKING:
    from epo_jax.models.tokenizer import ChatTokenizer


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Static settings of a rollout.

    Attributes:
        slots: environments that play at the same time, in each process its share.
        max_turns: turn limit of an episode.
        max_tokens: most tokens in a context, answer included. An episode whose conversation would outgrow it ends as
            truncated; a window is cut to fit.
        max_policy_tokens: most tokens that the policy may emit in an episode, which ends as truncated before it could
            exceed them.
        response_tokens: most tokens in a turn's answer.
        style: prompt style, see `epo_jax.envs.agent`.
        window: what each turn's prompt repeats of earlier turns; None appends to one conversation instead.
        lanes: groups of slots that work independently of each other.
        block: tokens decoded at most before a row whose turn ended can go on.
        ahead: environments that each lane resets before a row is free.
        dtype: of the parameters and the arithmetic while sampling; None keeps the model's.
        cache_dtype: "int8" stores keys and values in 8 bits; None keeps the arithmetic's type.
        devices: number of devices that share every lane's rows, each with a copy of the parameters. Parameters on a mesh of
            several devices are sampled on that mesh instead: its rows are sharded along "data" and "fsdp", and the parameters
            are all-gathered along "fsdp" for the rollout.
        at_once: members of a sweep that one call of a compiled program computes; 1 uses the programs of a single run.
    """

    slots: int
    max_turns: int
    max_tokens: int
    max_policy_tokens: int
    response_tokens: int
    style: str
    window: agent.Window | None = None
    lanes: int = 2
    block: int = 64
    ahead: int = 2
    dtype: str | None = None
    cache_dtype: str | None = None
    devices: int = 1
    at_once: int = 1


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """The distribution that tokens are sampled from, see `generate.Sampling`; what is trained on is not truncated."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0


def window_of(config) -> agent.Window | None:
    """The window of a run's config; None for a conversation."""
    if config.agent.context == "chat":
        return None
    return agent.Window(config.agent.history_turns, config.agent.history_actions)


def rollout_config(config) -> RolloutConfig:
    """The rollout settings of a run's config.

    A conversation is in one row of the learner's batch, which bounds its policy tokens; a window's turns are in several.
    """
    window = window_of(config)
    return RolloutConfig(
        slots=config.rollout.slots,
        max_turns=config.env.max_turns,
        max_tokens=config.agent.max_tokens,
        max_policy_tokens=(
            config.train.rows_policy_tokens if window is None else config.env.max_turns * config.agent.response_tokens
        ),
        response_tokens=config.agent.response_tokens,
        style=config.agent.style,
        window=window,
        lanes=config.rollout.lanes,
        block=config.rollout.block,
        ahead=config.rollout.ahead,
        dtype=config.rollout.dtype or None,
        cache_dtype=config.rollout.cache_dtype or None,
        devices=config.rollout.devices,
    )


def next_prompt(
    tokenizer: ChatTokenizer,
    config: RolloutConfig,
    first: Observation,
    history: list[tuple[str, str]],
    observation: Observation,
    last: int | None = None,
) -> list[int]:
    """Ids that the agent reads next: a window's whole context, or the next part of a conversation.

    Args:
        first: the observation after the reset.
        history: (observation text, action) of every turn so far.
        observation: the latest; `first` at the first turn.
        last: the last token of the turn before.
    """
    short_enough = functools.partial(fits, tokenizer, config)
    message = agent.message(first, history, observation, config.style, config.window, short_enough)
    return tokenizer.following(message, last) if history and config.window is None else tokenizer.first(message)


def refuse_rewriting(tokenizer: ChatTokenizer, config, source: object) -> None:
    """Refuses a conversation if the chat template changes its earlier turns.

    Args:
        source: names the model in the message.

    Raises:
        UserError: config.agent.context is "chat", and the template rewrites turns of config.agent.style.
    """
    rewrites = tokenizer.frame.rewrites
    if config.agent.context == "chat" and (rewrites == "turns" or (rewrites == "thoughts" and config.agent.style == "tagged")):
        raise UserError(
            f"config.agent.context=chat: the chat template of {source} changes earlier turns of a conversation"
            f"{' (it drops their thoughts)' * (rewrites == 'thoughts')}, so nothing can be appended to it; "
            "set config.agent.context=window."
        )


def fits(tokenizer: ChatTokenizer, config: RolloutConfig, message: str) -> bool:
    """Whether a window's message and its answer fit in a context."""
    return len(tokenizer.first(message)) + config.response_tokens <= config.max_tokens
