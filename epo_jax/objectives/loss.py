"""From sampled episodes to L_EPO, in the order a train step calls it.

estimate(episodes, ...)          once per RL step: advantages
loss_rows(...)                   once per mini-batch: every average becomes a weight per token
smoothing_terms(history, ...)    once per mini-batch: where the corridor lies and how much it weighs
epo_loss(log_prob, entropy, ...) per micro-batch: losses and metric sums that add up to the mini-batch's
record(history, ...)             once per RL step: the history that the next step sees, with this step's entropy
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from epo_jax.objectives import advantages, controls, entropy, policy, registry
from epo_jax.objectives.advantages import Estimate
from epo_jax.objectives.spec import EntropyHistory, Episodes, Hyper, LossRows, ObjectiveConfig, Smoothing, Step
from epo_jax.parity import released_rows

__all__ = [
    "EntropyHistory", "Episodes", "Estimate", "Hyper", "LossRows", "ObjectiveConfig", "Smoothing",
    "epo_loss", "estimate", "loss_rows", "record", "smoothing_terms",
]  # fmt: skip


def estimate(episodes: Episodes, hyper: Hyper, objective: ObjectiveConfig) -> Estimate:
    """Advantages of a whole RL step's episodes, with the KL in the reward, the format penalty and the shaping that the
    objective asks for. Train on the `policy_mask` returned: it leaves out what DAPO drops (groups whose returns, as the
    environment gave them, are all equal). Raises ValueError for `kl="full"` in the reward."""
    mask, num = episodes.policy_mask, objective.num_trajectories
    kept = advantages.informative(episodes.returns, episodes.group, num)
    invalid = (1.0 - episodes.valid) * mask
    ends = advantages.turn_ends(mask, episodes.trajectory, episodes.turn, (num, objective.max_turns))
    cost = jnp.zeros_like(mask)
    if objective.format_penalty_place == "before":
        cost += hyper.format_penalty * invalid * ends
    if objective.kl_place == "reward" and objective.kl != "none":
        cost += hyper.kl_coef * policy.kl_estimate(episodes.log_prob, episodes.ref_log_prob, objective.kl) * mask
    reward = episodes.reward
    if objective.estimator == "gae" and objective.gae_scope == "turn":
        reward = episodes.returns[episodes.trajectory] * ends
    costs = jax.ops.segment_sum(cost.ravel(), episodes.trajectory.ravel(), num)
    episodes = episodes._replace(reward=reward - cost, returns=episodes.returns - costs)

    advantage, returns = registry.ESTIMATORS[objective.estimator](episodes, hyper, objective)
    advantage = registry.SHAPERS[objective.shaper](advantage, episodes, hyper, objective)
    if objective.format_penalty_place == "after":
        advantage -= hyper.format_penalty * invalid
    if objective.drop_uniform_groups:
        mask = mask * kept[episodes.trajectory]
    return Estimate(advantage * mask, returns * mask, mask)


def loss_rows(
    policy_mask: Float[Array, "B T"],
    trajectory: Int[Array, "B T"],
    turn: Int[Array, "B T"],
    old_log_prob: Float[Array, "B T"],
    ref_log_prob: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    hyper: Hyper,
    objective: ObjectiveConfig,
    *,
    behaviour_log_prob: Float[Array, "B T"] | None = None,
    behaviour_entropy: Float[Array, "B T"] | None = None,
    episode_keys: Key[Array, " N"] | None = None,
    given_weight: Float[Array, "B T"] | None = None,
) -> LossRows:
    """A whole mini-batch with its weights.

    `trajectory` and `turn` are 0 where padding; those tokens have mask 0. `old_log_prob` is the learner's own value
    before the update (or the sampler's, when the two agree). Some choices need more: `truncated_importance` the
    sampler's log-probability, SIREN the sampler's entropy, Clip-Cov a key for each trajectory. `given_weight` takes the
    place of every average (`released_rows.estimate`).
    """
    shape = objective.num_trajectories, objective.max_turns

    def weights(mask, mode, turn_decay=0.0):
        if given_weight is not None:
            return given_weight
        return policy.token_weights(mask, trajectory, turn, *shape, mode, turn_decay, objective.max_tokens)

    weight = weights(policy_mask, objective.aggregation)
    surrogate_weight = weight
    if objective.truncated_importance:
        surrogate_weight *= policy.truncated_importance(old_log_prob, behaviour_log_prob, hyper.importance_cap)
    rows = LossRows(
        policy_mask, trajectory, turn, old_log_prob, ref_log_prob, advantage,
        weight=weight,
        surrogate_weight=surrogate_weight,
        divergence_weight=jnp.zeros_like(weight),
        entropy_weight=weights(
            _regularised(behaviour_entropy, policy_mask, trajectory, hyper, objective),
            objective.entropy_aggregation, hyper.turn_decay,
        ),
        mean_weight=weights(policy_mask, "token-mean"),
    )  # fmt: skip
    return registry.TOKEN_CONTROLS[objective.token_control](rows, episode_keys, hyper)


def smoothing_terms(
    history: EntropyHistory,
    step: Step,
    total_steps: int,
    behaviour_entropy: Float[Array, "B T"],
    rows: LossRows,
    hyper: Hyper,
    objective: ObjectiveConfig,
) -> Smoothing:
    """The corridor and its weight at RL step `step` (from 0) of `total_steps`, from earlier steps' entropies alone."""
    center, known = entropy.center(history, objective.history, hyper.window, hyper.ema_decay)
    total = jnp.maximum(rows.entropy_weight.sum(), 1e-30)
    batch_entropy = jax.lax.stop_gradient((behaviour_entropy * rows.entropy_weight).sum() / total)
    return Smoothing(
        center=center,
        known=known,
        beta=entropy.phase_weight(objective.phase, step, objective.phase_steps or total_steps, hyper.gamma),
        lam=registry.COEFFICIENTS[objective.coefficient](history, batch_entropy, hyper),
        batch_entropy=batch_entropy,
    )


def epo_loss(
    log_prob: Float[Array, "B T"],
    token_entropy: Float[Array, "B T"],
    rows: LossRows,
    smoothing: Smoothing,
    hyper: Hyper,
    objective: ObjectiveConfig,
    full_kl: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """These rows' share of L = L_MT - lam * (L_H - beta * L_smooth) + kl_coef * KL (EPO v2, eq. 2-6), and of the metrics.

    `log_prob` and `token_entropy` are the current policy's at the sampled tokens; off the mask anything finite.
    `full_kl` is needed with kl = "full" (`head.fused_full_kl`). The metric `kl` is nats per policy token.
    """
    shape = objective.num_trajectories, objective.max_turns
    log_ratio = log_prob - rows.old_log_prob
    log_ratio = policy.scope_mean(
        log_ratio, rows.policy_mask, rows.trajectory, rows.turn, *shape, objective.ratio_scope
    )
    surrogate = policy.ppo_surrogate(log_ratio, rows.advantage, hyper.clip_low, hyper.clip_high, hyper.dual_clip)
    policy_loss = (rows.surrogate_weight * surrogate.loss + rows.divergence_weight * policy.size(log_ratio)).sum()
    entropy_loss, penalty = registry.ENTROPY_TERMS[objective.entropy_term](
        token_entropy, rows, smoothing, hyper, objective
    )
    loss = policy_loss + entropy_loss
    sums = {
        "policy_loss": policy_loss,
        "entropy_loss": entropy_loss,
        "entropy": (rows.mean_weight * token_entropy).sum(),
        "outside_corridor": jnp.where(penalty > 0, rows.mean_weight, 0.0).sum(),
        "clip_fraction": (rows.mean_weight * surrogate.clipped).sum(),
        "dual_clip_fraction": (rows.mean_weight * surrogate.dual_clipped).sum(),
        "approx_kl": -(rows.mean_weight * surrogate.log_ratio).sum(),
        "approx_kl_k3": (rows.mean_weight * (jnp.expm1(surrogate.log_ratio) - surrogate.log_ratio)).sum(),
    }
    if objective.kl != "none" and objective.kl_place == "loss":
        kl = full_kl if objective.kl == "full" else policy.kl_estimate(log_prob, rows.ref_log_prob, objective.kl)
        sums["kl"] = (rows.mean_weight * kl).sum()
        loss += hyper.kl_coef * (rows.weight * kl).sum()
    return loss, {"loss": loss} | sums


def record(
    history: EntropyHistory,
    behaviour_entropy: Float[Array, "B T"],
    policy_mask: Float[Array, "B T"],
    trajectory: Int[Array, "B T"],
    turn: Int[Array, "B T"],
    hyper: Hyper,
    objective: ObjectiveConfig,
) -> EntropyHistory:
    """The history with this RL step's mean entropy over policy tokens, of the data as it was sampled, for the steps to
    come. SIREN's is the mean that its own term takes."""
    weight = policy_mask
    if objective.entropy_term == "siren":
        peaks = _regularised(behaviour_entropy, policy_mask, trajectory, hyper, objective)
        shape = objective.num_trajectories, objective.max_turns
        weight = policy.token_weights(
            peaks, trajectory, turn, *shape, objective.entropy_aggregation, hyper.turn_decay, objective.max_tokens
        )
    num_turns = objective.max_turns if objective.history_index == "turn" else None
    step = entropy.step_entropy(behaviour_entropy, weight, turn, num_turns)
    return entropy.append(history, *(released_rows.left_padded(*step) if objective.released else step))


def _regularised(behaviour_entropy, policy_mask, trajectory, hyper, objective):
    """Mask of the tokens whose entropy is regularised: all, or with SIREN those of peak entropy."""
    if objective.entropy_term == "siren":
        return controls.peak_mask(
            behaviour_entropy, policy_mask, trajectory, objective.num_trajectories, hyper.peak_quantile
        )
    return policy_mask
