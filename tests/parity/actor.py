"""What only the conformance tests need of the authors' released code: its actor's loss on turn rows, pass@k, ReMax.

Faults are kept: micro-batches averaged whatever their token counts, a penalty without gradient, an average over the response's
padding (`scope="seq"`), empty rows that make a mean NaN.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epo_jax.objectives import advantages, policy
from epo_jax.objectives.entropy import corridor_penalty, phase_weight
from epo_jax.objectives.spec import Hyper, KLKind, Scalar
from epo_jax.parity.released import first_rows, masked_mean, row_statistics
from epo_jax.settings.table import Aggregation

PHASE_STEPS = 150  # the reference implementation's E, whatever the length of the run


def response_mask(ids: Int[Array, "B T"], eos: tuple[int, ...]) -> Int[Array, "B T"]:
    """1 up to and including the first end token of each row."""
    ended = jnp.isin(ids, jnp.array(eos, ids.dtype)).astype(ids.dtype)
    return (jnp.cumsum(ended, axis=1) - ended == 0).astype(ids.dtype)


def aggregate(loss: Float[Array, "B T"], mask: Float[Array, "B T"], mode: Aggregation) -> Float[Array, ""]:
    """One number from a micro-batch of rows; a row without tokens makes `seq-mean-token-mean` NaN."""
    match mode:
        case "token-mean":
            return masked_mean(loss, mask)
        case "seq-mean-token-sum":
            return (loss * mask).sum(-1).mean()
        case "seq-mean-token-mean":
            return ((loss * mask).sum(-1) / mask.sum(-1)).mean()
        case "seq-mean-token-sum-norm":
            return (loss * mask).sum() / mask.shape[-1]
    raise ValueError(f"The release has no aggregation {mode!r}.")


def best_margin(scores: Float[Array, " B"], group: Int[Array, " B"], counted: Float[Array, " B"]) -> Float[Array, " B"]:
    """Pass@k: the group's best row gets the margin over its second best, all others nothing."""
    open_scores = jnp.where(counted > 0, scores, -jnp.inf)
    best = jax.ops.segment_max(open_scores, group, scores.size)[group]
    order = jnp.arange(scores.size)
    first = jax.ops.segment_min(jnp.where(open_scores == best, order, scores.size), group, scores.size)[group]
    second = jax.ops.segment_max(jnp.where(order == first, -jnp.inf, open_scores), group, scores.size)[group]
    return jnp.where(order == first, best - second, 0.0)


def remax(
    rewards: Float[Array, "B T"], baseline: Float[Array, " B"], mask: Float[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(advantages, returns): reward to come, less the greedy episode's score on the mask."""
    returns = jnp.cumsum((rewards * mask)[:, ::-1], axis=1)[:, ::-1]
    return returns - baseline[:, None] * mask, returns


class PenaltyConfig(NamedTuple):
    """The release's smoothing flags: weight, corridor ratios, penalty outside it, scope, first turn it applies to."""

    coef: Scalar = 1.0
    low: Scalar = 0.8
    high: Scalar = 1.2
    outside: Scalar = 0.1
    scope: Literal["token", "seq"] = "token"
    first_turn: int = 0


def outside_corridor(
    entropy: Float[Array, "B T"], history: Float[Array, " S"], turn: Int[Array, " B"], penalty: PenaltyConfig
) -> Float[Array, "B T"]:
    """1 where the token's entropy, or with `scope="seq"` its row's mean over all columns, padding included, lies outside
    the corridor around its turn's past entropy, else 0; NaN for a turn beyond the history."""
    measured = entropy if penalty.scope == "token" else jnp.broadcast_to(entropy.mean(1, keepdims=True), entropy.shape)
    center = jnp.broadcast_to(history.at[turn].get(mode="fill", fill_value=jnp.nan)[:, None], entropy.shape)
    return corridor_penalty(measured, center, penalty.low, penalty.high, "indicator") + 0.0 * center


def surrogate(
    log_prob: Float[Array, "B T"],
    old_log_prob: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    hyper: Hyper,
    mode: Aggregation,
    token_scale: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The clipped policy loss of a micro-batch of rows and its metrics; `token_scale` multiplies the per-token loss."""
    part = policy.ppo_surrogate(log_prob - old_log_prob, advantage, hyper.clip_low, hyper.clip_high, hyper.dual_clip)
    loss = aggregate(part.loss if token_scale is None else part.loss * token_scale, mask, mode)
    return loss, {
        "pg_loss": loss,
        "pg_clipfrac": masked_mean(part.clipped, mask),
        "ppo_kl": masked_mean(-part.log_ratio, mask),
        "pg_clipfrac_lower": masked_mean(part.dual_clipped, mask),
    }


def actor_loss(
    log_prob: Float[Array, "B T"],
    entropy: Float[Array, "B T"],
    old_log_prob: Float[Array, "B T"],
    ref_log_prob: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    turn: Int[Array, " B"],
    history: Float[Array, " S"],
    epoch: Scalar | int,
    hyper: Hyper,
    mode: Aggregation = "token-mean",
    kl: KLKind = "none",
    penalty: PenaltyConfig | None = None,
    epoch_weight: bool = False,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of one micro-batch of turn rows; the release averages these over micro-batches, each counting alike.

    `history` is the mean entropy per turn index of this batch and earlier ones, left-padded with zeros. The corridor
    term is a constant of the parameters: with or without it the gradient is that of a plain entropy bonus. Raises
    ValueError for a penalty without any history.
    """
    loss, metrics = surrogate(log_prob, old_log_prob, advantage, mask, hyper, mode)
    bonus = aggregate(entropy, mask, mode)
    if penalty is not None:
        if not history.size:
            raise ValueError("The release's penalty needs a history of one entropy per turn; this one is empty.")
        open_gate = (turn >= penalty.first_turn)[:, None]
        outside = outside_corridor(entropy, history, turn, penalty)
        weight = phase_weight("two_stage", epoch, PHASE_STEPS) if epoch_weight else 1.0
        bonus -= weight * penalty.coef * aggregate(jnp.where(open_gate, penalty.outside * outside, 0.0), mask, mode)
        metrics["entropy_mask_ratio"] = jnp.where(open_gate, 1.0 - outside, 0.0).mean()
    loss -= hyper.lam * bonus
    if kl != "none":
        metrics["kl_loss"] = aggregate(policy.kl_estimate(log_prob, ref_log_prob, kl), mask, mode)
        loss += hyper.kl_coef * metrics["kl_loss"]
    return loss, metrics


def pass_at_k(
    rewards: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    group: Int[Array, " B"],
    trajectory: Int[Array, " B"],
    every_row: bool,
    normalize: bool,
) -> Float[Array, "B T"]:
    """Pass@k's advantage, `best_margin` spread over the row's tokens; NaN in a group of one."""
    scores = rewards.sum(-1)
    _, std, size = row_statistics(scores, group, trajectory, every_row)
    row = best_margin(scores, group, jnp.ones_like(scores) if every_row else first_rows(trajectory))
    row = row / (std + advantages.EPSILON) if normalize else row
    return jnp.where(size > 1, row, jnp.nan)[:, None] * mask
