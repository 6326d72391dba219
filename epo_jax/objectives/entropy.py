"""Entropy smoothing: the history of past entropies, the corridor around its mean, the phase weight (EPO v2, eq. 3-5).

All entropies are in nats, of the distribution that was sampled from (after the temperature). The history is a pytree
that travels inside the train state; nothing here looks at the current step's entropy, so the corridor is always built
from earlier steps alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epo_jax.objectives.spec import EntropyHistory, Scalar, Step
from epo_jax.settings.hyper import Hyper
from epo_jax.settings.table import HistoryMode, Penalty, Phase

_DEFAULTS = Hyper()


class Center(NamedTuple):
    """The center of the corridor: `value` [I] in nats, meaningful where `known` [I] is 1; 0 before any history."""

    value: Float[Array, " I"]
    known: Float[Array, " I"]


def init_history(num_steps: int, num_turns: int | None = None) -> EntropyHistory:
    """An empty history for a run of `num_steps` RL steps; with `num_turns`, one series per turn index."""
    shape = (num_steps, num_turns or 1)
    return EntropyHistory(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.int32))


def resize(history: EntropyHistory, num_steps: int) -> EntropyHistory:
    """The history with room for `num_steps` RL steps, at least as many as it counts."""

    def fit(x: Float[Array, "K I"]) -> Float[Array, "N I"]:
        return jnp.pad(x, ((0, max(0, num_steps - len(x))), (0, 0)))[:num_steps]

    return history._replace(values=fit(history.values), observed=fit(history.observed))


def step_entropy(
    entropy: Float[Array, "B T"], weight: Float[Array, "B T"], turn: Int[Array, "B T"], num_turns: int | None = None
) -> tuple[Float[Array, " I"], Float[Array, " I"]]:
    """Mean entropy of one RL step's tokens as they were sampled, each with its weight (the policy mask: all alike):
    (mean [I], observed [I]), ready to append."""
    index = turn.ravel() if num_turns else jnp.zeros(turn.size, jnp.int32)
    share = jax.ops.segment_sum(weight.ravel(), index, num_turns or 1)
    total = jax.ops.segment_sum((entropy * weight).ravel(), index, num_turns or 1)
    return total / jnp.where(share > 0, share, 1.0), (share > 0).astype(jnp.float32)


def append(history: EntropyHistory, mean: Float[Array, " I"], observed: Float[Array, " I"]) -> EntropyHistory:
    """The history after an RL step. Steps beyond the capacity K are counted but not kept; a mean that is not finite counts as
    not observed, so that it cannot spoil the corridor of later steps."""
    observed = jnp.where(jnp.isfinite(mean), observed, 0.0)
    return EntropyHistory(
        values=history.values.at[history.count].set(jnp.where(observed > 0, mean, 0.0), mode="drop"),
        observed=history.observed.at[history.count].set(observed, mode="drop"),
        count=history.count + 1,
    )


def center(
    history: EntropyHistory,
    mode: HistoryMode = "cumulative",
    window: Scalar = _DEFAULTS.window,
    ema_decay: Scalar = _DEFAULTS.ema_decay,
) -> Center:
    """Hbar: one average over the stored steps, per series.

    `cumulative`: all of them (the paper). `sliding`: the last `window` steps. `ema`: weights `ema_decay ** age`,
    normalized. `initial`: the first step alone, SIREN's anchor. No gradient flows into it.
    """
    step = jnp.arange(history.values.shape[0])
    age = (history.count - 1 - step).astype(jnp.float32)
    match mode:
        case "cumulative":
            weight = jnp.ones_like(age)
        case "sliding":
            weight = (age < window).astype(jnp.float32)
        case "ema":
            weight = jnp.power(ema_decay, jnp.maximum(age, 0.0))
        case "initial":
            weight = (step == 0).astype(jnp.float32)
    weight = jnp.where(age >= 0, weight, 0.0)[:, None] * history.observed
    total = weight.sum(0)
    mean = (weight * history.values).sum(0) / jnp.where(total > 0, total, 1.0)
    return Center(jax.lax.stop_gradient(mean), (total > 0).astype(jnp.float32))


def corridor_penalty(
    entropy: Float[Array, "*shape"],
    center: Float[Array, "*shape"],
    kappa_l: Scalar,
    kappa_r: Scalar,
    kind: Penalty = "hinge",
) -> Float[Array, "*shape"]:
    """Distance of an entropy from [kappa_l * center, kappa_r * center] (eq. 3), without the factor alpha.

    `hinge`: the distance in nats, slope -1 below, 0 inside, +1 above. `indicator`: 1 outside and 0 inside (v1 and the
    reference implementation), a constant of the parameters, so its gradient is exactly zero.
    """
    low, high = kappa_l * center, kappa_r * center
    if kind == "hinge":
        return jax.nn.relu(low - entropy) + jax.nn.relu(entropy - high)
    return jax.lax.stop_gradient(1.0 - ((entropy > low) & (entropy < high)).astype(entropy.dtype))


def phase_weight(kind: Phase, step: Step | Scalar, total: int, gamma: Scalar = _DEFAULTS.gamma) -> Float[Array, ""]:
    """beta_k, the weight of the smoothing term at RL step k of `total`.

    `exponential` (eq. 5): 1 + exp(-gamma k / floor(total/2)), from 2 towards 1. `constant`: 1 (the paper's W/O DW).
    `mean`: the mean of `exponential` over the `total` steps, so that both weigh the term alike over a run.
    `two_stage`: the reference implementation's curve, falling from 1 to 0.83 by half-time and then from 0.8 to 0.04.
    """
    k, half = jnp.asarray(step, jnp.float32), total // 2

    def exponential(k: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return 1.0 + jnp.exp(-gamma * k / max(half, 1))

    match kind:
        case "exponential":
            return exponential(k)
        case "constant":
            return jnp.ones((), jnp.float32)
        case "mean":
            return exponential(jnp.arange(total, dtype=jnp.float32)).mean()
        case "two_stage":
            k = jnp.clip(k, 0.0, float(total))
            early = 1.0 - 0.2 * (1.0 - jnp.exp(-2.0 * k / max(half, 1)))
            late = 0.8 * jnp.exp(-3.0 * (k - half) / max(total - half, 1))
            return jnp.where(k <= half, early, late)


def step_weight(step: Step | Scalar, total: int, step_decay: Scalar) -> Float[Array, ""]:
    """exp(-step_decay k / total), by which lam falls with the RL step k (EPO-Decay as in the paper's B.4.1)."""
    return jnp.exp(-step_decay * jnp.asarray(step, jnp.float32) / total)
