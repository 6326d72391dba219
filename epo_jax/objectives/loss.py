"""From sampled episodes to L_EPO, in the order in which a train step calls it.

estimate(batch, old, ...)        once per RL step: advantages
weigh(batch, old, ...)           once per mini-batch: every average becomes a weight per token
smoothing_terms(history, ...)    once per mini-batch: the corridor and its weight
epo_loss(current, rows, ...)     per micro-batch: losses and metric sums that add up to the mini-batch's
ratio_spread(sums)               once per mini-batch: of those sums, variance and effective sample size of the ratio
record(history, ...)             once per RL step: the history that the next step sees, with this step's entropy
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from epo_jax.objectives import advantages, controls, entropy, policy, registry
from epo_jax.objectives.batch import Current, Old, Rows, TokenBatch, Weights
from epo_jax.objectives.spec import EntropyHistory, Hyper, ObjectiveConfig, Smoothing, Step


def estimate(batch: TokenBatch, old: Old, hyper: Hyper, objective: ObjectiveConfig) -> Old:
    """`old` with advantages and returns, of the episodes of a whole RL step.

    Includes the KL in the reward, the format penalty and the shaping of the objective; the returned `mask` leaves out what
    DAPO drops (groups whose returns, as the environment gave them, are all equal). The tokens of an episode must be in one row
    [B, T].

    Raises:
        ValueError: kl="full" in the reward.
    """
    mask, num = old.mask, objective.num_trajectories
    kept = advantages.informative(batch.returns, batch.group, num)
    invalid = (1.0 - batch.valid) * mask
    ends = advantages.turn_ends(mask, batch.trajectory, batch.turn, (num, objective.max_turns))
    cost = jnp.zeros_like(mask)
    if objective.format_penalty_place == "before":
        cost += hyper.format_penalty * invalid * ends
    if objective.kl_place == "reward" and objective.kl != "none":
        cost += hyper.kl_coef * policy.kl_estimate(old.log_prob, old.ref_log_prob, objective.kl) * mask
    reward = batch.reward
    if objective.estimator == "gae" and objective.gae_scope == "turn":
        reward = batch.returns[batch.trajectory] * ends
    costs = jax.ops.segment_sum(cost.ravel(), batch.trajectory.ravel(), num)
    batch = batch._replace(reward=reward - cost, returns=batch.returns - costs)

    advantage, returns = registry.ESTIMATORS[objective.estimator](batch, old, hyper, objective)
    advantage = registry.SHAPERS[objective.shaper](advantage, batch, old, hyper, objective)
    if objective.format_penalty_place == "after":
        advantage -= hyper.format_penalty * invalid
    if objective.drop_uniform_groups:
        mask = mask * kept[batch.trajectory]
    return old._replace(advantage=advantage * mask, returns=returns * mask, mask=mask)


def weigh(batch: TokenBatch, old: Old, hyper: Hyper, objective: ObjectiveConfig, episode_keys: Key[Array, " N"] | None) -> Rows:
    """The rows of a whole mini-batch with every average of the loss as a weight per token.

    `old` is what `estimate` returned; `episode_keys`, one for each trajectory, are what Clip-Cov draws from.
    """
    shape = objective.num_trajectories, objective.max_turns

    def weights(mask, mode, turn_decay=0.0):
        return policy.token_weights(mask, batch.trajectory, batch.turn, *shape, mode, turn_decay, objective.max_tokens)

    weight = weights(old.mask, objective.aggregation)
    regularized = _regularized(batch, old, old.mask, hyper, objective)
    rows = Rows(batch, old, Weights(
        policy=weight,
        surrogate=weight,
        divergence=jnp.zeros_like(weight),
        entropy=weights(regularized, objective.entropy_aggregation, hyper.turn_decay),
        mean=weights(old.mask, "token-mean"),
    ))  # fmt: skip
    return control(rows, hyper, objective, episode_keys)


def control(rows: Rows, hyper: Hyper, objective: ObjectiveConfig, episode_keys: Key[Array, " N"] | None) -> Rows:
    """The rows after truncated importance sampling and the token control, which change weights."""
    if objective.truncated_importance:
        scale = policy.truncated_importance(rows.old.log_prob, rows.batch.behaviour_log_prob, hyper.importance_cap)
        rows = rows._replace(weights=rows.weights._replace(surrogate=rows.weights.surrogate * scale))
    return registry.TOKEN_CONTROLS[objective.token_control](rows, episode_keys, hyper)


def smoothing_terms(
    history: EntropyHistory, step: Step, total_steps: int, rows: Rows, hyper: Hyper, objective: ObjectiveConfig
) -> Smoothing:
    """The corridor and its weight at RL step `step` (from 0) of `total_steps`, from earlier steps' entropies alone."""
    center, known = entropy.center(history, objective.history, hyper.window, hyper.ema_decay)
    total = jnp.maximum(rows.weights.entropy.sum(), 1e-30)
    batch_entropy = jax.lax.stop_gradient((rows.old.entropy * rows.weights.entropy).sum() / total)
    beta = entropy.phase_weight(objective.phase, step, objective.phase_steps or total_steps, hyper.gamma)
    lam = registry.COEFFICIENTS[objective.coefficient](history, batch_entropy, hyper)
    return Smoothing(
        center=center,
        known=known,
        beta=jnp.where(step >= hyper.start_step, beta, 0.0),
        lam=lam * entropy.step_weight(step, total_steps, hyper.step_decay),
        batch_entropy=batch_entropy,
    )


def epo_loss(
    current: Current, rows: Rows, smoothing: Smoothing, hyper: Hyper, objective: ObjectiveConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """These rows' share of L = L_MT - lam * (L_H - beta * L_smooth) + kl_coef * KL (EPO v2, eq. 2-6), and of the metrics.

    Off the mask `current` may be anything finite. The metric `kl` is nats per policy token; `ratio_excess_square` is the mean
    of (r - 1)^2.
    """
    batch, old, weights = rows
    log_ratio = policy.scope_mean(
        current.log_prob - old.log_prob, old.mask, batch.trajectory, batch.turn,
        objective.num_trajectories, objective.max_turns, objective.ratio_scope,
    )  # fmt: skip
    surrogate = policy.ppo_surrogate(log_ratio, old.advantage, hyper.clip_low, hyper.clip_high, hyper.dual_clip)
    policy_loss = (weights.surrogate * surrogate.loss + weights.divergence * policy.size(log_ratio)).sum()
    entropy_loss, penalty = registry.ENTROPY_TERMS[objective.entropy_term](current.entropy, rows, smoothing, hyper, objective)
    loss = policy_loss + entropy_loss
    half = jnp.expm1(0.5 * surrogate.log_ratio)  # r - 1 = half (half + 2), without sharing a term with the sums beside it
    sums = {
        "policy_loss": policy_loss,
        "entropy_loss": entropy_loss,
        "entropy": (weights.mean * current.entropy).sum(),
        "outside_corridor": jnp.where(penalty > 0, weights.mean, 0.0).sum(),
        "clip_fraction": (weights.mean * surrogate.clipped).sum(),
        "dual_clip_fraction": (weights.mean * surrogate.dual_clipped).sum(),
        "approx_kl": -(weights.mean * surrogate.log_ratio).sum(),
        "approx_kl_k3": (weights.mean * (jnp.expm1(surrogate.log_ratio) - surrogate.log_ratio)).sum(),
        "ratio_excess_square": (weights.mean * jnp.square(half * (half + 2.0))).sum(),
    }
    if objective.kl != "none" and objective.kl_place == "loss":
        estimated = objective.kl != "full"
        kl = policy.kl_estimate(current.log_prob, old.ref_log_prob, objective.kl) if estimated else current.full_kl
        sums["kl"] = (weights.mean * kl).sum()
        loss += hyper.kl_coef * (weights.policy * kl).sum()
    return loss, {"loss": loss} | sums


def ratio_spread(sums: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
    """A mini-batch's metrics with variance and effective sample size of the ratio r in place of the mean of (r - 1)^2.

    The effective sample size is the share (E r)^2 / E r^2 of the policy tokens. Both are computed from r - 1, as rounding of r
    would hide the variance of ratios near 1.
    """
    mean = sums["approx_kl_k3"] - sums["approx_kl"]  # E(r - 1 - log r) + E log r
    square = sums["ratio_excess_square"]
    kept = {name: x for name, x in sums.items() if name != "ratio_excess_square"}
    return kept | {
        "ratio_variance": jnp.maximum(square - jnp.square(mean), 0.0),
        "effective_sample_size": jnp.square(1.0 + mean) / (1.0 + 2.0 * mean + square),
    }


def record(history: EntropyHistory, batch: TokenBatch, old: Old, hyper: Hyper, objective: ObjectiveConfig) -> EntropyHistory:
    """The history with this RL step's mean entropy, for the steps to come; [B, T].

    The mean is over the policy tokens of the data as it was sampled; for SIREN it is the mean that its own term takes.
    """
    num_turns = objective.max_turns if objective.history_index == "turn" else None
    weight = batch.policy_mask
    if objective.entropy_term == "siren":
        peaks = _regularized(batch, old, batch.policy_mask, hyper, objective)
        shape = objective.num_trajectories, objective.max_turns
        weight = policy.token_weights(
            peaks, batch.trajectory, batch.turn, *shape, objective.entropy_aggregation, hyper.turn_decay, objective.max_tokens
        )
    return entropy.append(history, *entropy.step_entropy(old.entropy, weight, batch.turn, num_turns))


def _regularized(batch, old, mask, hyper, objective):
    """The mask of the tokens whose entropy is regularized: all, or with SIREN those of peak entropy."""
    if objective.entropy_term == "siren":
        return controls.peak_mask(old.entropy, mask, batch.trajectory, objective.num_trajectories, hyper.peak_quantile)
    return mask
