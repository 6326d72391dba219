"""Advantages as the authors' released code computes them (WujiangXu/EPO at 5b6fa98).

That code trains on turn rows, one row per turn with its response tokens, [B, T], and takes every statistic over rows. Its faults
are kept, such as group statistics in which a long episode counts once per turn.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epo_jax.objectives import advantages
from epo_jax.objectives.spec import Scalar


def masked_mean(x: Float[Array, "*shape"], mask: Float[Array, "*shape"], axis: int | None = None) -> Float[Array, "*out"]:
    return (x * mask).sum(axis) / (mask.sum(axis) + 1e-8)


def masked_var(x: Float[Array, "*shape"], mask: Float[Array, "*shape"], unbiased: bool = True) -> Float[Array, ""]:
    variance = masked_mean(jnp.square(centered(x, mask)), mask)
    return variance * mask.sum() / (mask.sum() - 1.0) if unbiased else variance


def centered(x: Float[Array, "*shape"], mask: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x less its masked mean, in two passes: one leaves the mean's rounding error in every entry."""
    once = x - masked_mean(x, mask)
    return once - masked_mean(once, mask)


def whiten(x: Float[Array, "*shape"], mask: Float[Array, "*shape"], shift_mean: bool = True) -> Float[Array, "*shape"]:
    """Unlike ours, leaves (shifted and scaled) values off the mask. NaN with fewer than two entries."""
    whitened = centered(x, mask) * jax.lax.rsqrt(masked_var(x, mask) + 1e-8)
    whitened = jnp.where(mask.sum() > 1, whitened, jnp.nan)
    return whitened if shift_mean else whitened + masked_mean(x, mask)


def row_statistics(
    scores: Float[Array, " B"], group: Int[Array, " B"], trajectory: Int[Array, " B"], every_row: bool
) -> advantages.GroupStatistics:
    """Group statistics over turn rows: all of them, so that long episodes dominate, or each trajectory's first."""
    counted = None if every_row else first_rows(trajectory)
    return advantages.group_statistics(scores, group, scores.size, counted)


def first_rows(trajectory: Int[Array, " B"]) -> Float[Array, " B"]:
    """1 on the first row of each trajectory."""
    order = jnp.arange(trajectory.size)
    return (jax.ops.segment_min(order, trajectory, trajectory.size)[trajectory] == order).astype(jnp.float32)


def outcome_advantage(
    name: Literal["grpo", "rloo", "reinforce_pp_baseline"],
    rewards: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    group: Int[Array, " B"],
    trajectory: Int[Array, " B"],
    every_row: bool = True,
    normalize: bool = True,
) -> Float[Array, "B T"]:
    """Each row's score (the sum of its rewards) against its group, spread over the row's tokens."""
    scores = rewards.sum(-1)
    deviation, std, size = row_statistics(scores, group, trajectory, every_row)
    match name:
        case "grpo":
            row = deviation / (std + advantages.EPSILON) if normalize else deviation
        case "rloo":
            row = deviation * jnp.where(size > 1, size / jnp.maximum(size - 1.0, 1.0), 1.0)
        case "reinforce_pp_baseline":
            tokens = deviation[:, None] * mask
            return whiten(tokens, mask) * mask
    return row[:, None] * mask


def gae(
    rewards: Float[Array, "B T"], values: Float[Array, "B T"], mask: Float[Array, "B T"], gamma: Scalar, lam: Scalar
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """GAE inside a row, through every column whatever the mask: (whitened advantages, returns)."""
    advantage, returns = advantages.gae(rewards, values, jnp.ones_like(mask), jnp.zeros(mask.shape, jnp.int32), gamma, lam)
    return whiten(advantage, mask), returns


def reinforce_pp(
    rewards: Float[Array, "B T"], mask: Float[Array, "B T"], gamma: Scalar
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(whitened, raw) discounted reward to come, which starts afresh before every token off the mask."""
    segment = jnp.cumsum((mask == 0).astype(jnp.int32), axis=1)
    returns = advantages.gae(rewards, jnp.zeros_like(mask), jnp.ones_like(mask), segment, gamma, 1.0)[1]
    return whiten(returns, mask) * mask, returns


def gigpo(
    rewards: Float[Array, "B T"],
    step_returns: Float[Array, " B"],
    mask: Float[Array, "B T"],
    anchor: Int[Array, " B"],
    group: Int[Array, " B"],
    trajectory: Int[Array, " B"],
    weight: Scalar,
    normalize: bool,
) -> Float[Array, "B T"]:
    """Episode advantage over all rows plus `weight` times the step advantage; `anchor` < B, distinct between groups."""
    episode = outcome_advantage("grpo", rewards, mask, group, trajectory, normalize=normalize)
    step = advantages.step_advantages(step_returns[:, None], anchor[:, None], jnp.ones_like(mask[:, :1]), normalize)
    return episode + weight * step * mask
