"""Advantages and weights of the reference implementation, on packed episodes.

The reference implementation trains on turn rows: one row per turn of an episode, [B, L] response tokens. Here episodes stay
packed, and the turn rows exist only as a table of indices. All it does with them amounts to an advantage and a weight per token:

    group statistics, whitening and GAE   over turn rows, copies among them
    rows copied at random                 until the batch is a multiple of `mini_turns` rows
    mini-batches                          the batch cut every `mini_turns` rows, in order, wherever that cuts an episode
    micro-batches averaged alike          a token weighs 1 / (micro-batches * tokens of its micro-batch)
    entropy history                       one mean per turn index, right-aligned, the current step's among them

The number of mini-batches depends on how many turns were played, so the weights have room for the most there can be. Faults of
its sampler (finished episodes continue and count in the history; contexts are cut) are not reproduced.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epo_jax.objectives import advantages, policy, registry
from epo_jax.objectives.batch import Old, TokenBatch
from epo_jax.objectives.spec import Hyper, ObjectiveConfig
from epo_jax.parity import released


class TurnRows(NamedTuple):
    """The reference batch: B rows, first every turn in the order of episode and turn, then the copies.

    Attributes:
        key: which turn the row is, trajectory * max_turns + turn.
        live: 1 where there is a row; shapes are fixed, so some are empty.
        mini: its mini-batch.
        micro: its micro-batch, counted over the whole batch.
    """

    key: Int[Array, " B"]
    live: Float[Array, " B"]
    mini: Int[Array, " B"]
    micro: Int[Array, " B"]


def turn_rows(tokens: Int[Array, " K"], mini_turns: int, micro_turns: int, key: Array) -> TurnRows:
    """The rows of a batch of K possible turns with `tokens` policy tokens each (0: no such turn). Random turns are copied
    until the rows are a multiple of `mini_turns`; the rows are then cut into mini-batches, and these every `micro_turns`
    rows into micro-batches."""
    absent = tokens == 0
    count = (~absent).sum()
    order = jnp.argsort(absent, stable=True)
    shuffled = jnp.lexsort((jax.random.uniform(key, absent.shape), absent))
    rank, slot = jnp.arange(tokens.size), jnp.arange(mini_turns - 1)
    place = jnp.concatenate([rank, count + slot])
    return TurnRows(
        key=jnp.concatenate([order, shuffled[slot % jnp.maximum(count, 1)]]),
        live=jnp.concatenate([rank < count, slot < -count % mini_turns]).astype(jnp.float32),
        mini=place // mini_turns,
        micro=place // micro_turns,
    )


def turn_weights(rows: TurnRows, tokens: Int[Array, " K"], mini_turns: int, micro_turns: int) -> Float[Array, "M K"]:
    """The weight of a token of each turn in each mini-batch: the mean over micro-batches of their token means. A mini-batch
    past the last row has weight 0."""
    num_mini, num_micro = -(-tokens.size // mini_turns), mini_turns // micro_turns
    micro_tokens = jax.ops.segment_sum(tokens[rows.key] * rows.live, rows.micro, num_mini * num_micro)[rows.micro]
    weight = rows.live / ((micro_tokens + 1e-8) * num_micro)
    return jnp.zeros((num_mini, tokens.size)).at[rows.mini, rows.key].add(weight, mode="drop")


def estimate(
    batch: TokenBatch, old: Old, key: Array, hyper: Hyper, objective: ObjectiveConfig
) -> tuple[Old, Float[Array, "M K"]]:
    """`old` with the reference advantages, and the weight of a token of turn k = trajectory * max_turns + turn in the averages of
    mini-batch m.

    The episode's return is the reward of every turn's last token, less the format penalty of that turn and the KL of its
    tokens.
    """
    shape, length = (objective.num_trajectories, objective.max_turns), objective.turn_tokens
    mask, turn_key = old.mask, batch.trajectory * objective.max_turns + batch.turn
    if objective.drop_uniform_groups:
        kept = advantages.informative(batch.returns, batch.group, objective.num_trajectories)
        mask = mask * kept[batch.trajectory]
        old = old._replace(mask=mask)
    position = jnp.arange(mask.size).reshape(mask.shape)
    first = jax.ops.segment_min(jnp.where(mask > 0, position, mask.size).ravel(), turn_key.ravel(), shape[0] * shape[1])
    column = jnp.where(mask > 0, position - first[turn_key], length)  # the tokens of a turn are adjacent

    def by_turn(x: Float[Array, "B T"]) -> Float[Array, "K L"]:
        return jnp.zeros((shape[0] * shape[1], length), x.dtype).at[turn_key, column].set(x, mode="drop")

    ends = advantages.turn_ends(mask, batch.trajectory, batch.turn, shape)
    reward = (batch.returns[batch.trajectory] - hyper.format_penalty * (1.0 - batch.valid)) * ends
    if objective.kl_place == "reward" and objective.kl != "none":
        reward -= hyper.kl_coef * policy.kl_estimate(old.log_prob, old.ref_log_prob, objective.kl) * mask
    turn_mask = by_turn(mask)
    tokens = turn_mask.sum(1).astype(jnp.int32)
    rows = turn_rows(tokens, objective.mini_turns, objective.micro_turns, key)
    advantage, returns = _row_advantages(rows, by_turn, batch, old, reward, turn_mask, hyper, objective)

    def by_token(x: Float[Array, "R L"]) -> Float[Array, "B T"]:
        place = jnp.where(rows.live > 0, rows.key, tokens.size)
        of_turn = jnp.zeros(turn_mask.shape, x.dtype).at[place].set(x, mode="drop")  # a copy's advantage is its original's
        return of_turn[turn_key, jnp.minimum(column, length - 1)] * mask

    shaped = registry.SHAPERS[objective.shaper](by_token(advantage), batch, old, hyper, objective)
    weights = turn_weights(rows, tokens, objective.mini_turns, objective.micro_turns)
    return old._replace(advantage=shaped * mask, returns=by_token(returns), mask=mask), weights


def _row_advantages(rows, by_turn, batch, old, reward, turn_mask, hyper, objective):
    """(advantages, returns) [B, L] of the turn rows. Empty rows form a group and an anchor of their own."""
    live = rows.live > 0
    rewards, mask = by_turn(reward)[rows.key] * rows.live[:, None], turn_mask[rows.key] * rows.live[:, None]
    trajectory = rows.key // objective.max_turns
    group = jnp.where(live, batch.group[trajectory], objective.num_trajectories)
    match objective.estimator:
        case "gae":
            return released.gae(rewards, by_turn(old.value)[rows.key] * mask, mask, hyper.discount, hyper.gae_lambda)
        case "reinforce_pp":
            return released.reinforce_pp(rewards, mask, hyper.discount)
        case "gigpo":
            turn_rewards = advantages.turn_sums(batch.reward * old.mask, batch.trajectory, batch.turn, batch.anchor.shape)
            steps = advantages.step_returns(turn_rewards, hyper.discount).ravel()[rows.key]
            anchor = jnp.where(live, batch.anchor.ravel()[rows.key], rows.key.size - 1)
            advantage = released.gigpo(
                rewards, steps * rows.live, mask, anchor, group, trajectory, hyper.gigpo_weight, normalize=False
            )
        case name:
            base: Any = "grpo" if name == "dr_grpo" else name
            advantage = released.outcome_advantage(base, rewards, mask, group, trajectory, normalize=name == "grpo")
    return advantage, advantage


def left_padded(mean: Float[Array, " I"], observed: Float[Array, " I"]) -> tuple[Float[Array, " I"], Float[Array, " I"]]:
    """A step's mean entropy per turn as the reference implementation stores it: right-aligned after zeros, which count too."""
    turns = jnp.max(jnp.where(observed > 0, jnp.arange(observed.size), -1)) + 1
    return jnp.roll(mean * observed, observed.size - turns), jnp.ones_like(observed)
