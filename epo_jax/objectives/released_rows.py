"""The release's arithmetic inside our train step, for the arms `+released`.

The release trains on turn rows, one row per turn of an episode, [B, L] response tokens. Here episodes stay packed, and the
turn rows exist only as a table of indices; all that the release does with them comes down to an advantage and a weight per
token:

    group statistics, whitening and GAE   over turn rows, copies among them
    rows copied at random                 until each mini-batch has a multiple of `micro_turns` rows
    micro-batches averaged alike          a token weighs 1 / (micro-batches * tokens of its micro-batch)
    entropy history                       one mean per turn index, right-aligned, the current step's among them

Two things differ: a mini-batch holds whole episodes (the release: a fixed number of turn rows, wherever that cuts an
episode), and copies fill each up to whole micro-batches (the release: the batch, up to whole mini-batches). What the
release's sampler does wrong (finished episodes play on and count in the history; contexts are cut) is not the objective's
and not reproduced.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epo_jax.objectives import advantages, policy, registry, released
from epo_jax.objectives.advantages import Estimate
from epo_jax.objectives.spec import Episodes, Hyper, ObjectiveConfig


class TurnRows(NamedTuple):
    """The release's batch: B rows, first every turn in the order of mini-batch, episode and turn, then the copies.

    Attributes:
        key: which turn the row is, trajectory * max_turns + turn.
        live: 1 where there is a row; shapes are fixed, so some are empty.
        mini: its mini-batch.
        micro: its micro-batch, counted within the mini-batch.
    """

    key: Int[Array, " B"]
    live: Float[Array, " B"]
    mini: Int[Array, " B"]
    micro: Int[Array, " B"]


def turn_rows(
    tokens: Int[Array, " K"], mini: Int[Array, " K"], num_mini: int, micro_turns: int, key: Array
) -> TurnRows:
    """The rows of a batch of K possible turns with `tokens` policy tokens each (0: no such turn), dealt to `num_mini`
    mini-batches by `mini`. In each, random turns are copied until the rows are a multiple of `micro_turns`."""
    live = tokens > 0
    mini = jnp.where(live, mini, num_mini)
    count = jax.ops.segment_sum(live.astype(jnp.int32), mini, num_mini + 1)[:num_mini]
    start = jnp.cumsum(count) - count
    order = jnp.lexsort((jnp.arange(tokens.size), mini))
    shuffled = jnp.lexsort((jax.random.uniform(key, mini.shape), mini))
    turns = mini[order]
    rank = jnp.arange(tokens.size) - start[jnp.minimum(turns, num_mini - 1)]

    # The slots for copies of every mini-batch, as many as can be needed.
    of, slot = (x.ravel() for x in jnp.mgrid[:num_mini, : micro_turns - 1])
    copied = shuffled[start[of] + slot % jnp.maximum(count[of], 1)]
    needed = (slot < -count[of] % micro_turns).astype(jnp.float32)
    return TurnRows(
        key=jnp.concatenate([order, copied]),
        live=jnp.concatenate([live[order].astype(jnp.float32), needed]),
        mini=jnp.concatenate([jnp.minimum(turns, num_mini - 1), of]),
        micro=jnp.concatenate([rank, count[of] + slot]) // micro_turns,
    )


def turn_weights(rows: TurnRows, tokens: Int[Array, " K"], num_mini: int) -> Float[Array, " K"]:
    """What a token of each turn weighs in its mini-batch: the mean over micro-batches of their token means."""
    size = rows.key.size
    micro = rows.mini * size + rows.micro
    micro_tokens = jax.ops.segment_sum(tokens[rows.key] * rows.live, micro, num_mini * size)[micro]
    num_micro = 1 + jax.ops.segment_max(jnp.where(rows.live > 0, rows.micro, -1), rows.mini, num_mini)[rows.mini]
    weight = rows.live / ((micro_tokens + 1e-8) * jnp.maximum(num_micro, 1))
    return jax.ops.segment_sum(weight, rows.key, tokens.size)


def estimate(
    episodes: Episodes, mini: Int[Array, " N"], num_mini: int, key: Array, hyper: Hyper, objective: ObjectiveConfig
) -> tuple[Estimate, Float[Array, "B T"]]:
    """Advantages as the release has them, and the weight of every token in its mini-batch's averages.

    `mini` is the mini-batch of each trajectory. The episode's return is the reward of every turn's last token, less the
    format penalty of that turn and the KL of its tokens.
    """
    shape, length = (objective.num_trajectories, objective.max_turns), objective.turn_tokens
    mask, turn_key = episodes.policy_mask, episodes.trajectory * objective.max_turns + episodes.turn
    if objective.drop_uniform_groups:
        kept = advantages.informative(episodes.returns, episodes.group, objective.num_trajectories)
        mask = mask * kept[episodes.trajectory]
        episodes = episodes._replace(policy_mask=mask)
    position = jnp.arange(mask.size).reshape(mask.shape)
    first = jax.ops.segment_min(jnp.where(mask > 0, position, mask.size).ravel(), turn_key.ravel(), shape[0] * shape[1])
    column = jnp.where(mask > 0, position - first[turn_key], length)  # a turn's tokens lie side by side

    def by_turn(x: Float[Array, "B T"]) -> Float[Array, "K L"]:
        return jnp.zeros((shape[0] * shape[1], length), x.dtype).at[turn_key, column].set(x, mode="drop")

    ends = advantages.turn_ends(mask, episodes.trajectory, episodes.turn, shape)
    reward = (episodes.returns[episodes.trajectory] - hyper.format_penalty * (1.0 - episodes.valid)) * ends
    if objective.kl_place == "reward" and objective.kl != "none":
        reward -= hyper.kl_coef * policy.kl_estimate(episodes.log_prob, episodes.ref_log_prob, objective.kl) * mask
    turn_mask = by_turn(mask)
    tokens = turn_mask.sum(1).astype(jnp.int32)
    mini_of_turn = jnp.repeat(mini, shape[1], total_repeat_length=tokens.size)
    rows = turn_rows(tokens, mini_of_turn, num_mini, objective.micro_turns, key)
    advantage, returns = _row_advantages(rows, by_turn, episodes, reward, turn_mask, hyper, objective)

    def by_token(x: Float[Array, "R L"]) -> Float[Array, "B T"]:
        of_turn = jnp.zeros(turn_mask.shape, x.dtype).at[rows.key].set(x)  # a copy's advantage is its original's
        return of_turn[turn_key, jnp.minimum(column, length - 1)] * mask

    weight = turn_weights(rows, tokens, num_mini)[turn_key] * mask
    shaped = registry.SHAPERS[objective.shaper](by_token(advantage), episodes, hyper, objective)
    return Estimate(shaped * mask, by_token(returns), mask), weight


def _row_advantages(rows, by_turn, episodes, reward, turn_mask, hyper, objective):
    """(advantages, returns) [B, L] of the turn rows. Empty rows form a group and an anchor of their own."""
    live = rows.live > 0
    rewards, mask = by_turn(reward)[rows.key] * rows.live[:, None], turn_mask[rows.key] * rows.live[:, None]
    trajectory = rows.key // objective.max_turns
    group = jnp.where(live, episodes.group[trajectory], objective.num_trajectories)
    match objective.estimator:
        case "gae":
            return released.gae(
                rewards, by_turn(episodes.value)[rows.key] * mask, mask, hyper.discount, hyper.gae_lambda
            )
        case "reinforce_pp":
            return released.reinforce_pp(rewards, mask, hyper.discount)
        case "gigpo":
            turn_rewards = advantages.turn_sums(
                episodes.reward * episodes.policy_mask, episodes.trajectory, episodes.turn, episodes.anchor.shape
            )
            steps = advantages.step_returns(turn_rewards, hyper.discount).ravel()[rows.key]
            anchor = jnp.where(live, episodes.anchor.ravel()[rows.key], rows.key.size - 1)
            advantage = released.gigpo(
                rewards, steps * rows.live, mask, anchor, group, trajectory, hyper.gigpo_weight, normalise=False
            )
        case name:
            base = "grpo" if name == "dr_grpo" else name
            advantage = released.outcome_advantage(base, rewards, mask, group, trajectory, normalise=name == "grpo")
    return advantage, advantage


def left_padded(mean: Float[Array, " I"], observed: Float[Array, " I"]) -> tuple[Float[Array, " I"], Float[Array, " I"]]:
    """A step's mean entropy per turn as the release stores it: right-aligned, zeros before, all of it counted."""
    turns = jnp.max(jnp.where(observed > 0, jnp.arange(observed.size), -1)) + 1
    return jnp.roll(mean * observed, observed.size - turns), jnp.ones_like(observed)
