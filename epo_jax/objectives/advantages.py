"""Advantage estimators.

The basic ones take `returns` [N] (each episode's total reward) and `group` [N] (the index of its task instance, below
`num_groups`), and return one advantage per episode, which all its policy tokens share; GAE returns one per token.
`loss.estimate` runs the whole chain for a batch: KL and format penalties, the estimator, whitening, shaping.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epo_jax.objectives.batch import Old, TokenBatch
from epo_jax.objectives.spec import Hyper, ObjectiveConfig, Scalar

EPSILON = 1e-6


class GroupStatistics(NamedTuple):
    """Each entry's return relative to its group: `deviation` = R - mean, `std` (ddof = 1), `size`; all [N].

    In a group of one the deviation is the return itself and std is 1.
    """

    deviation: Float[Array, " N"]
    std: Float[Array, " N"]
    size: Float[Array, " N"]


def group_statistics(
    returns: Float[Array, " N"],
    group: Int[Array, " N"],
    num_groups: int,
    counted: Float[Array, " N"] | None = None,
) -> GroupStatistics:
    """Statistics over each group's entries, or over those with `counted` = 1 (the reference implementation counts turn rows)."""
    counted = jnp.ones_like(returns) if counted is None else counted
    size = jax.ops.segment_sum(counted, group, num_groups)
    mean = jax.ops.segment_sum(returns * counted, group, num_groups) / jnp.maximum(size, 1.0)
    # If all returns are equal, the deviation must be exactly 0: the division by (std + 1e-6) would amplify a rounding error.
    deviation = jnp.where(spread(returns, group, num_groups) > 0, returns - mean[group], 0.0)
    square = jax.ops.segment_sum(jnp.square(deviation) * counted, group, num_groups)
    std = jnp.sqrt(square / jnp.maximum(size - 1.0, 1.0))
    alone = (size <= 1)[group]
    return GroupStatistics(jnp.where(alone, returns, deviation), jnp.where(alone, 1.0, std[group]), size[group])


def grpo(returns: Float[Array, " N"], group: Int[Array, " N"], num_groups: int) -> Float[Array, " N"]:
    """GRPO: (R - group mean) / (group std + 1e-6)."""
    deviation, std, _ = group_statistics(returns, group, num_groups)
    return deviation / (std + EPSILON)


def dr_grpo(returns: Float[Array, " N"], group: Int[Array, " N"], num_groups: int) -> Float[Array, " N"]:
    """Dr.GRPO (arXiv 2503.20783): R - group mean, not divided by the standard deviation."""
    return group_statistics(returns, group, num_groups).deviation


def rloo(returns: Float[Array, " N"], group: Int[Array, " N"], num_groups: int) -> Float[Array, " N"]:
    """RLOO: R - the mean of the group's others. A group of one keeps its return."""
    deviation, _, size = group_statistics(returns, group, num_groups)
    return deviation * jnp.where(size > 1, size / jnp.maximum(size - 1.0, 1.0), 1.0)


def spread(returns: Float[Array, " N"], group: Int[Array, " N"], num_groups: int) -> Float[Array, " N"]:
    """Largest less smallest return of each entry's group."""
    high, low = jax.ops.segment_max(returns, group, num_groups), jax.ops.segment_min(returns, group, num_groups)
    return (high - low)[group]


def informative(returns: Float[Array, " N"], group: Int[Array, " N"], num_groups: int) -> Float[Array, " N"]:
    """1 for episodes of groups whose returns differ, 0 where all are equal (DAPO drops those and samples others)."""
    return (spread(returns, group, num_groups) > 0).astype(jnp.float32)


def whiten(x: Float[Array, "*shape"], mask: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """(x - mean) / sqrt(variance + 1e-8), over the masked entries (variance with ddof = 1), 0 elsewhere."""
    count = mask.sum()
    mean = (x * mask).sum() / jnp.maximum(count, 1.0)
    variance = (jnp.square(x - mean) * mask).sum() / jnp.maximum(count - 1.0, 1.0)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-8) * mask


def turn_sums(
    x: Float[Array, "B T"], trajectory: Int[Array, "B T"], turn: Int[Array, "B T"], shape: tuple[int, int]
) -> Float[Array, "N U"]:
    """Sum of x over each turn's tokens; `shape` is (trajectories, turns). Mask x first."""
    return jax.ops.segment_sum(x.ravel(), (trajectory * shape[1] + turn).ravel(), shape[0] * shape[1]).reshape(shape)


def turn_ends(
    policy_mask: Float[Array, "B T"], trajectory: Int[Array, "B T"], turn: Int[Array, "B T"], shape: tuple[int, int]
) -> Float[Array, "B T"]:
    """1 on the last policy token of every turn."""
    key = (trajectory * shape[1] + turn).ravel()
    position = jnp.where(policy_mask.ravel() > 0, jnp.arange(key.size), -1)
    last = jax.ops.segment_max(position, key, shape[0] * shape[1])
    return ((position == last[key]) & (position >= 0)).astype(jnp.float32).reshape(policy_mask.shape)


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    policy_mask: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    gamma: Scalar = 1.0,
    lam: Scalar = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalized advantage estimation over the policy tokens of each segment: (advantages, returns), 0 off the mask.

    Observation tokens are skipped, so credit flows across turns; a new segment (another trajectory in the same row) starts
    from zero.

        reward   0 0 . . 1   (. = observation)   value 0, gamma = 1/2, lam = 1
        returns ¼ ½ 0 0 1
    """

    def step(carry, token):
        next_value, next_advantage, next_segment = carry
        reward, value, mask, segment = token
        same = (segment == next_segment).astype(values.dtype)
        next_value, next_advantage = next_value * same, next_advantage * same
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        policy = mask > 0
        carry = jnp.where(policy, value, next_value), jnp.where(policy, advantage, next_advantage), segment
        return carry, jnp.where(policy, advantage, 0.0)

    start = jnp.zeros_like(values[:, 0]), jnp.zeros_like(values[:, 0]), jnp.zeros_like(segment_ids[:, 0])
    by_token = jax.tree.map(jnp.transpose, (rewards, values, policy_mask, segment_ids))
    _, advantages = jax.lax.scan(step, start, by_token, reverse=True)
    advantages = advantages.T
    return advantages, (advantages + values) * policy_mask


def step_returns(turn_rewards: Float[Array, "N U"], discount: Scalar) -> Float[Array, "N U"]:
    """Discounted sum of the rewards from each turn on."""

    def step(later, reward):
        now = reward + discount * later
        return now, now

    return jax.lax.scan(step, jnp.zeros_like(turn_rewards[:, 0]), turn_rewards.T, reverse=True)[1].T


def step_advantages(
    returns: Float[Array, "N U"], anchor: Int[Array, "N U"], present: Float[Array, "N U"], normalize: bool = False
) -> Float[Array, "N U"]:
    """GiGPO's step advantage (arXiv 2505.10978): a turn's return less the mean over the turns that started from the
    same anchor observation, divided by their std if `normalize`. It is 0 if no other turn has that anchor."""
    statistics = group_statistics(returns.ravel(), anchor.ravel(), anchor.size, present.ravel())
    advantage = jnp.where(statistics.size > 1, statistics.deviation, 0.0)
    if normalize:
        advantage /= statistics.std + EPSILON
    return advantage.reshape(returns.shape) * present


def by_trajectory(estimator):
    """Lifts a per-trajectory estimator to tokens: every policy token gets its trajectory's advantage."""

    def estimate_tokens(batch: TokenBatch, old: Old, hyper: Hyper, objective: ObjectiveConfig):
        per_trajectory = estimator(batch.returns, batch.group, objective.num_trajectories)
        return per_trajectory[batch.trajectory], batch.returns[batch.trajectory]

    return estimate_tokens


def maybe_whitened(advantage: Float[Array, "B T"], old: Old, objective: ObjectiveConfig):
    return whiten(advantage, old.mask) if objective.whiten else advantage


def gae_estimate(batch: TokenBatch, old: Old, hyper: Hyper, objective: ObjectiveConfig):
    """PPO: GAE with the critic's values, across turns or (`gae_scope="turn"`) inside each turn; whitened."""
    segment = batch.trajectory
    if objective.gae_scope == "turn":
        segment = segment * objective.max_turns + batch.turn
    advantage, returns = gae(batch.reward, old.value, old.mask, segment, hyper.discount, hyper.gae_lambda)
    return maybe_whitened(advantage, old, objective), returns


def reinforce_pp(batch: TokenBatch, old: Old, hyper: Hyper, objective: ObjectiveConfig):
    """REINFORCE++ (arXiv 2501.03262): the discounted reward to come, whitened over policy tokens."""
    zero = jnp.zeros_like(old.value)
    returns = gae(batch.reward, zero, old.mask, batch.trajectory, hyper.discount, 1.0)[1]
    return maybe_whitened(returns, old, objective), returns


def reinforce_pp_baseline(batch: TokenBatch, old: Old, hyper: Hyper, objective: ObjectiveConfig):
    """REINFORCE++ with the group's mean as baseline, whitened over policy tokens."""
    advantage, returns = by_trajectory(dr_grpo)(batch, old, hyper, objective)
    return maybe_whitened(advantage, old, objective), returns


def gigpo(batch: TokenBatch, old: Old, hyper: Hyper, objective: ObjectiveConfig):
    """GiGPO: group deviation of the episode plus `gigpo_weight` times the step advantage among equal anchors."""
    shape = objective.num_trajectories, objective.max_turns
    index = batch.trajectory, batch.turn
    turn_rewards = turn_sums(batch.reward * old.mask, *index, shape)
    present = (turn_sums(old.mask, *index, shape) > 0).astype(jnp.float32)
    steps = step_advantages(step_returns(turn_rewards, hyper.discount), batch.anchor, present)
    advantage, returns = by_trajectory(dr_grpo)(batch, old, hyper, objective)
    return advantage + hyper.gigpo_weight * steps[index], returns
