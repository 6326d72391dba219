"""The RL step with the arithmetic of the authors' released code, for methods with "+released".

It differs from `training.step` in four places: advantages and averages are taken over turn rows (`released_rows`), mini-batches
are cut from the order of turns, the corridor includes the current step's entropy, and all updates of an RL step share one
learning rate, which is 0 in the first step.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from epo_jax.common import keys
from epo_jax.objectives import entropy
from epo_jax.objectives.batch import Old, Rows, TokenBatch, Weights
from epo_jax.objectives.loss import control, smoothing_terms
from epo_jax.objectives.spec import EntropyHistory, Hyper
from epo_jax.parity import released_rows
from epo_jax.training import step
from epo_jax.training.optim import warmup_cosine
from epo_jax.training.state import LearnerConfig, TrainState
from epo_jax.training.step_metrics import Metrics, step_metrics


def configure(config: LearnerConfig) -> LearnerConfig:
    """The learner with the released schedule: it counts RL steps, and the critic's rate is constant."""

    def constant(optim):
        return optim and dataclasses.replace(optim, updates=config.total_steps, schedule="constant")

    return dataclasses.replace(config, optim=constant(config.optim), critic_optim=constant(config.critic_optim))


@jax.named_scope("train_step")
def train_step(config: LearnerConfig, state: TrainState, batch: TokenBatch, hyper: Hyper) -> tuple[TrainState, Metrics]:
    """One RL step as the released code takes it.

    Raises:
        ValueError: the batch has more than one mini-batch; this step cuts its own.
    """
    if batch.rows.shape[0] != 1:
        raise ValueError('A method with "+released" cuts its own mini-batches: pack with mini_batches=1.')
    hyper = hyper._replace(kl_coef=hyper.kl_coef * state.kl_scale)
    batch = step.on_mesh(batch)
    old, gap = step.before_update(config, state, batch)
    key = jax.random.fold_in(keys.key(batch.seed, "learner"), state.step)
    with jax.named_scope("advantages"):
        places = step.episode_places(config, batch)
        laid_out = step.by_episode(config, batch, old, places)
        found, turn_weights = released_rows.estimate(*laid_out, key, hyper, config.objective)
        old = step.estimated(old, found, places)
    history = record(state.history, *step.flat(batch, old), config.objective.max_turns)
    schedule = warmup_cosine(config.optim, 1.0, 0.0)
    hyper_now = hyper._replace(lr=hyper.lr * schedule(state.step))

    def update(trained, i):
        now = state._replace(**trained)
        rows, live = mini_batch(config, batch, old, turn_weights[i % turn_weights.shape[0]], hyper)
        smoothing = smoothing_terms(history, state.step, config.total_steps, rows, hyper, config.objective)
        first = i == 0 if config.gradient_norms else None
        return step.update_once(config, now, rows, smoothing, hyper_now, live, first)

    count = config.epochs * turn_weights.shape[0]
    trained, updates = jax.lax.scan(update, step.trained_part(state), jnp.arange(count))
    metrics = gap | step_metrics(config, updates, history, batch, old, hyper)
    kl_scale, kl_metrics = step.next_kl_scale(config, state, updates, batch, old, hyper)
    return state._replace(step=state.step + 1, history=history, kl_scale=kl_scale, **trained), metrics | kl_metrics


def mini_batch(
    config: LearnerConfig, batch: TokenBatch, old: Old, turn_weights: Float[Array, " K"], hyper: Hyper
) -> tuple[Rows, Array]:
    """The rows of a mini-batch whose turns have these weights, those with one of its turns first, and how many these are."""
    batch_rows, old = jax.tree.map(lambda x: x[0], (batch.by_row(), old))
    weight = turn_weights[batch_rows.trajectory * config.objective.max_turns + batch_rows.turn] * old.mask
    old = old._replace(mask=(weight > 0).astype(weight.dtype))
    rows = Rows(batch_rows, old, Weights(weight, weight, jnp.zeros_like(weight), weight, weight))
    rows = control(rows, hyper, config.objective, step.episode_keys(batch))
    needed = weight.any(axis=1)
    order = jnp.argsort(~needed, stable=True)
    return jax.tree.map(lambda x: x[order], rows), needed.sum()


def record(history: EntropyHistory, batch: TokenBatch, old: Old, max_turns: int) -> EntropyHistory:
    """The history with this step's mean entropy of each turn index, as the released code stores it."""
    means = entropy.step_entropy(old.entropy, batch.policy_mask, batch.turn, max_turns)
    return entropy.append(history, *released_rows.left_padded(*means))
