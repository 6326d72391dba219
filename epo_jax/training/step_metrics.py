"""The metrics of an RL step that the train step computes, from its updates and the tokens that it trained on."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from epo_jax.objectives import entropy
from epo_jax.objectives.batch import Old, TokenBatch
from epo_jax.objectives.spec import EntropyHistory, Hyper
from epo_jax.training.state import LearnerConfig

Metrics = dict[str, Float[Array, ""]]

# What `step.gradient_parts` measures at the first update.
GRADIENT_PARTS = ("policy_grad_norm", "entropy_grad_norm", "grad_cosine")


def step_metrics(
    config: LearnerConfig,
    updates: tuple[Metrics, Metrics, Array],
    corridor: EntropyHistory,
    batch: TokenBatch,
    old: Old,
    hyper: Hyper,
) -> Metrics:
    """The metrics of an RL step: means and extremes over its updates, and what is measured of its data.

    `corridor` is the history that the updates saw.
    """
    of_updates, maxima, made = updates
    count, last = made.sum(), jnp.where(made, jnp.arange(made.size), 0).max()
    center = entropy.center(corridor, config.objective.history, hyper.window, hyper.ema_decay)
    policy_tokens = jnp.maximum(batch.policy_mask.sum(), 1.0)
    means = jax.tree.map(lambda x: jnp.where(made, x, 0.0).sum() / jnp.maximum(count, 1), of_updates)
    return means | {
        "updates": count.astype(jnp.float32),
        "skipped_updates": of_updates["skipped_updates"].sum(),
        "behaviour_entropy": (batch.behaviour_entropy * batch.policy_mask).sum() / policy_tokens,
        "entropy_change": of_updates["entropy_change"][last],
        "corridor_center": (center.value * center.known).sum() / jnp.maximum(center.known.sum(), 1.0),
        "ratio_max": jnp.exp(maxima["ratio_max"].max()),
        "ratio_min": jnp.exp(-maxima["ratio_min"].max()),
        **{name: maxima[name].max() for name in GRADIENT_PARTS if name in maxima},
        **advantage_statistics(old),
    }


def advantage_statistics(old: Old) -> Metrics:
    """Over the policy tokens that are trained on; without any, extremes are not finite and the rest is 0."""
    advantage, mask = old.advantage, old.mask
    tokens = jnp.maximum(mask.sum(), 1.0)
    mean = (advantage * mask).sum() / tokens
    return {
        "advantage_mean": mean,
        "advantage_std": jnp.sqrt((jnp.square(advantage - mean) * mask).sum() / tokens),
        "advantage_rms": jnp.sqrt((jnp.square(advantage) * mask).sum() / tokens),
        "advantage_min": jnp.where(mask > 0, advantage, jnp.inf).min(),
        "advantage_max": jnp.where(mask > 0, advantage, -jnp.inf).max(),
    }
