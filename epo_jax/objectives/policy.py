"""The base policy loss per token, and the weights that turn per-token losses into the average that was asked for.

Every average over a mini-batch is written as sum(weight * x) with weights computed once for the whole mini-batch. A
micro-batch then adds its own sum, and the split into micro-batches cannot change the result.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epo_jax.objectives.spec import KLKind, Scalar, Scope
from epo_jax.settings.table import Aggregation


class Surrogate(NamedTuple):
    """Per-token surrogate loss and its statistics, all [B, T].

    `clipped` is 1 where the clip of the ratio decides the loss, `dual_clipped` where the dual clip does; `log_ratio` is
    log pi - log pi_old after clamping to [-20, 20].
    """

    loss: Float[Array, "B T"]
    log_ratio: Float[Array, "B T"]
    clipped: Float[Array, "B T"]
    dual_clipped: Float[Array, "B T"]


def token_weights(
    policy_mask: Float[Array, "B T"],
    trajectory: Int[Array, "B T"],
    turn: Int[Array, "B T"],
    num_trajectories: int,
    max_turns: int,
    mode: Aggregation = "trajectory",
    turn_decay: Scalar = 0.0,
    max_tokens: int = 1,
) -> Float[Array, "B T"]:
    """Weights w with sum(w * x) = the average of x that `mode` names, for a whole mini-batch.

    `trajectory`: mean over trajectories of the mean over their turns of the mean over the turn's tokens (eq. 2).
    `token-mean`: every policy token alike. `seq-mean-token-mean`, `seq-mean-token-sum`: mean over trajectories of the
    mean or the sum over their tokens. `seq-mean-token-sum-norm` (Dr.GRPO): that sum over the constant `max_tokens`.
    A trajectory without a policy token in this mini-batch counts in no mean.

    `turn_decay` > 0 (EPO-Decay, with mode `trajectory`) weighs turn t by exp(-turn_decay * t / max_turns), normalized
    within each trajectory. That early turns weigh more is the paper's; the formula is our reading.
    """
    mask, trajectory, turn = policy_mask.ravel(), trajectory.ravel(), turn.ravel()
    tokens = jax.ops.segment_sum(mask, trajectory, num_trajectories)
    sequences = jnp.maximum((tokens > 0).sum().astype(jnp.float32), 1.0)
    match mode:
        case "trajectory":
            key = trajectory * max_turns + turn
            turn_tokens = jax.ops.segment_sum(mask, key, num_trajectories * max_turns)
            turn_weight = jnp.exp(-turn_decay * jnp.linspace(0.0, 1.0, max_turns, endpoint=False))[None]
            present = jnp.where(turn_tokens.reshape(num_trajectories, max_turns) > 0, turn_weight, 0.0)
            share = present / jnp.maximum(present.sum(1, keepdims=True), 1e-30)
            weight = mask * share.ravel()[key] / (jnp.maximum(turn_tokens, 1.0)[key] * sequences)
        case "token-mean":
            weight = mask / jnp.maximum(tokens.sum(), 1.0)
        case "seq-mean-token-mean":
            weight = mask / (jnp.maximum(tokens, 1.0)[trajectory] * sequences)
        case "seq-mean-token-sum":
            weight = mask / sequences
        case "seq-mean-token-sum-norm":
            weight = mask / (sequences * max_tokens)
    return weight.reshape(policy_mask.shape)


def scope_mean(
    x: Float[Array, "B T"],
    weight: Float[Array, "B T"],
    trajectory: Int[Array, "B T"],
    turn: Int[Array, "B T"],
    num_trajectories: int,
    max_turns: int,
    scope: Scope,
) -> Float[Array, "B T"]:
    """The weighted mean of x over each token's own turn or trajectory, written back to each token.

    All tokens of a turn (or trajectory) must be in the rows given.
    """
    if scope == "token":
        return x
    key = (trajectory * max_turns + turn if scope == "turn" else trajectory).ravel()
    segments = num_trajectories * max_turns if scope == "turn" else num_trajectories
    total = jax.ops.segment_sum(weight.ravel(), key, segments)
    mean = jax.ops.segment_sum((x * weight).ravel(), key, segments) / jnp.where(total > 0, total, 1.0)
    return mean[key].reshape(x.shape)


def ppo_surrogate(
    log_ratio: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    dual_clip: Scalar = 3.0,
) -> Surrogate:
    """PPO-clip with separate lower and upper clip (DAPO's clip-higher) and dual clip for negative advantages.

    loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and where A < 0 at most -A * dual_clip. With `log_ratio`
    a mean over the turn or trajectory (`scope_mean`) the same loss is GSPO (arXiv 2507.18071).
    """
    log_ratio = jnp.clip(log_ratio, -20.0, 20.0)
    ratio = jnp.exp(log_ratio)
    plain = -advantage * ratio
    clipped = -advantage * jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high))
    bound = -advantage * dual_clip
    # Selections, not maximum(): a token whose clip decides has gradient 0 whatever its weight, were it NaN.
    by_clip = clipped > plain
    loss = jnp.where(by_clip, clipped, plain)
    by_bound = (loss > bound) & (advantage < 0)
    return Surrogate(
        loss=jnp.where(by_bound, bound, loss),
        log_ratio=log_ratio,
        clipped=by_clip.astype(jnp.float32),
        dual_clipped=by_bound.astype(jnp.float32),
    )


# Below this many nats the derivative of `size` falls to 0: a ratio of pi and pi_old within 0.1 %.
_SIZE_WIDTH = 1e-3


@jax.custom_jvp
def size(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """|x| of a difference of log-probabilities, nats, with the derivative x / 1e-3 clipped to [-1, 1].

    Before the first update the two policies are one, and the difference is rounding: its sign, on which the whole
    derivative of |x| depends, is another with each split into micro-batches or devices (`jnp.abs` has +1 at 0). This
    derivative is 0 at 0, and rounding moves it by no more than rounding / 1e-3.
    """
    return jnp.abs(x)


@size.defjvp
def _size_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return jnp.abs(x), jnp.clip(x / _SIZE_WIDTH, -1.0, 1.0) * dx


def kl_estimate(
    log_prob: Float[Array, "*shape"], ref_log_prob: Float[Array, "*shape"], kind: KLKind = "k3"
) -> Float[Array, "*shape"]:
    """Per-token estimate of KL(pi || pi_ref) from the sampled token's log-probabilities (Schulman's names).

    `k1`: log pi - log pi_ref. `abs`: its `size`. `k2`: half its square (mse). `k3`: exp(-k1) + k1 - 1, clamped to
    [-10, 10]. The exact divergence over the vocabulary, `full`, needs both heads: `head.fused_full_kl`.
    """
    difference = log_prob - ref_log_prob
    match kind:
        case "k1":
            return difference
        case "abs":
            return size(difference)
        case "k2":
            return 0.5 * jnp.square(difference)
        case "k3":
            return jnp.clip(jnp.expm1(-difference) + difference, -10.0, 10.0)
    raise ValueError(f"KL kind {kind!r} is not an estimate from one token.")


def truncated_importance(
    old_log_prob: Float[Array, "B T"], behaviour_log_prob: Float[Array, "B T"], cap: Scalar
) -> Float[Array, "B T"]:
    """min(pi_old / pi_behaviour, cap): corrects for a sampler whose arithmetic differs from the learner's.

    `old_log_prob` is the learner's own value before the first update, `behaviour_log_prob` the sampler's.
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(old_log_prob - behaviour_log_prob), cap))


def adaptive_kl_coef(coef: Scalar, measured_kl: Scalar, target: Scalar, horizon: Scalar, num_samples: Scalar) -> Float[Array, ""]:
    """The next KL coefficient of the proportional controller of arXiv 1909.08593: moves by at most 20 % of
    `num_samples` / `horizon` towards the coefficient that would hold the divergence at `target` nats."""
    error = jnp.clip(jnp.asarray(measured_kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    return coef * (1.0 + error * num_samples / horizon)
