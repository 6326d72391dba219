"""One RL step of EPO as one compiled program: TrainState in, TrainState out.

    old       = log-probabilities, entropies, values and reference scores before any update
    old      += advantages, estimated from the batch and old
    for each epoch, for each mini-batch:
        weights = every average as a weight per token
        grad    = sum over micro-batches of the gradient of epo_loss
        params  = update(params, grad)
    history   = append(history, this step's mean entropy)

`train_step` is that text as a pure function; `make_train_step` compiles it for a mesh. Everything is a function of two pytrees:
`batch` (`TokenBatch`, what was sampled) and `old` (`Old`, what was known of it before the update). Loops stop at the last live
row, so shapes never change and padding costs nothing. On a mesh, micro-batches are sharded over rows; advantages and weights, a
few numbers a token, every device computes for itself.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from epo_jax.common import keys
from epo_jax.models import lora
from epo_jax.models.decoder import DecoderConfig, Params
from epo_jax.models.value import values
from epo_jax.objectives.batch import BATCH_AXES, Current, Old, Rows, TokenBatch
from epo_jax.objectives.loss import epo_loss, estimate, ratio_spread, record, smoothing_terms, weigh
from epo_jax.objectives.policy import adaptive_kl_coef, kl_estimate
from epo_jax.objectives.spec import Hyper, Smoothing
from epo_jax.objectives.value import value_loss
from epo_jax.parallel import mesh
from epo_jax.training.micro_batches import gradient_by_slopes, in_rows, summed_gradients
from epo_jax.training.optim import guarded_update, step_rate
from epo_jax.training.policy_tokens import head_divergence, head_inputs, head_statistics, policy_statistics
from epo_jax.training.state import LearnerConfig, TrainState, state_axes, state_shardings
from epo_jax.training.step_metrics import GRADIENT_PARTS, Metrics, step_metrics

TrainStep = Callable[[TrainState, TokenBatch, Hyper], tuple[TrainState, Metrics]]

# The fields of `TrainState` that updates change.
TRAINED = ("params", "opt_state", "critic", "critic_opt_state")


def make_train_step(config: LearnerConfig, on: Mesh | None = None) -> TrainStep:
    """The jitted RL step, over the devices of a mesh. The state is donated: the one passed in must not be used again."""
    step = step_function(config)
    if on is None:
        return jax.jit(step, donate_argnums=0)

    @functools.wraps(step)
    def train_step(state: TrainState, batch: TokenBatch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        with mesh.inside(on):
            return step(state, batch, hyper)

    state, everywhere = state_shardings(config, on), mesh.replicated(on)
    return jax.jit(
        train_step,
        in_shardings=(state, batch_shardings(on), everywhere),
        out_shardings=(state, everywhere),
        donate_argnums=0,
    )


def step_function(config: LearnerConfig) -> TrainStep:
    """The objective's RL step as a pure function, to be jitted or mapped over the members of a sweep."""
    step = importlib.import_module(config.objective.step).train_step
    return functools.wraps(step)(functools.partial(step, config))


def configure(config: LearnerConfig) -> LearnerConfig:
    """The learner as this step needs it: unchanged."""
    return config


def batch_shardings(on: Mesh) -> TokenBatch:
    """The sharding of each array of a batch."""
    return TokenBatch._make(NamedSharding(on, mesh.spec(*axes)) for axes in BATCH_AXES)


@jax.named_scope("train_step")
def train_step(config: LearnerConfig, state: TrainState, batch: TokenBatch, hyper: Hyper) -> tuple[TrainState, Metrics]:
    """One RL step of EPO, as in the module's pseudo-code."""
    objective = config.objective
    hyper = hyper._replace(kl_coef=hyper.kl_coef * state.kl_scale, lr=hyper.lr * step_rate(config.optim, state.step))
    if config.critic_optim:
        hyper = hyper._replace(critic_lr=hyper.critic_lr * step_rate(config.critic_optim, state.step))
    batch = on_mesh(batch)
    first = first_epoch(config, batch)
    old, gap = before_update(config, state, first)
    with jax.named_scope("advantages"):
        places = episode_places(config, first)
        old = estimated(old, estimate(*by_episode(config, first, old, places), hyper, objective), places)
    # The corridor is built from earlier steps alone, so updates read `state.history`.
    history = record(state.history, *flat(first, old), hyper, objective)
    drawn_from = episode_keys(batch)

    def update(trained, mini_batch):
        live, batch_rows, old_rows, leads = mini_batch
        rows = weigh(batch_rows, old_rows, hyper, objective, drawn_from)
        smoothing = smoothing_terms(state.history, state.step, config.total_steps, rows, hyper, objective)
        now = state._replace(**trained)
        return update_once(config, now, rows, smoothing, hyper, live, leads)

    old_rows = in_every_epoch(config, batch, old)
    mini_batches = batch.rows, batch.by_row(), old_rows, first_update(config, old_rows)
    trained, updates = jax.lax.scan(update, trained_part(state), mini_batches)
    metrics = gap | step_metrics(config, updates, state.history, first, old, hyper)
    kl_scale, kl_metrics = next_kl_scale(config, state, updates, first, old, hyper)
    return state._replace(step=state.step + 1, history=history, kl_scale=kl_scale, **trained), metrics | kl_metrics


# What is known before the update


def on_mesh(batch: TokenBatch) -> TokenBatch:
    """The batch with its per-token arrays whole on every device."""
    inputs = ("tokens", "positions", "segment_ids", "index", "label")
    return batch._replace(**{k: mesh.constrain(x) for k, x in batch._asdict().items() if k not in inputs})


def first_epoch(config: LearnerConfig, batch: TokenBatch) -> TokenBatch:
    """The mini-batches of the first pass over the data, which hold every token once."""
    if config.epochs == 1:
        return batch
    count = batch.rows.shape[0] // config.epochs
    return batch._replace(rows=batch.rows[:count], **{k: x[:count] for k, x in batch.by_row()._asdict().items() if x is not None})


@jax.named_scope("before_update")
def before_update(config: LearnerConfig, state: TrainState, batch: TokenBatch) -> tuple[Old, Metrics]:
    """What is known of the batch before this step's updates, without advantages, and the gap between sampler and learner.

    Log-probabilities and entropies are what the sampler recorded, or the learner's own where that will not do: where the
    sampler's arithmetic differed, or where the entropy is that of a nucleus.
    """
    objective, policy = config.objective, state.policy()
    zeros, gap = jnp.zeros_like(batch.policy_mask), {}
    ref_log_prob, value = zeros, zeros
    log_prob, token_entropy = batch.behaviour_log_prob, batch.behaviour_entropy
    if config.reference and objective.kl != "full":
        reference = reference_policy(config, state)
        ref_log_prob = per_policy_token(config, lambda rows: policy_statistics(*reference, rows, config.temperature)[0], batch)
    if config.critic_optim:
        value = per_policy_token(config, lambda rows: critic_values(config, state.critic, policy, rows), batch)
    if objective.own_old_log_prob or objective.entropy_top_p is not None:
        top_p = objective.entropy_top_p
        own = per_policy_token(
            config, lambda rows: policy_statistics(config.model, policy, rows, config.temperature, top_p), batch
        )
        apart = jnp.abs(own[0] - log_prob)
        gap = {"sampler_gap_mean": apart.sum() / jnp.maximum(batch.policy_mask.sum(), 1.0), "sampler_gap_max": apart.max()}
        log_prob = own[0] if objective.own_old_log_prob else log_prob
        token_entropy = own[1] if top_p is not None else token_entropy
    return Old(log_prob, token_entropy, value, ref_log_prob, batch.policy_mask), gap


def per_policy_token(config: LearnerConfig, fn: Callable, batch: TokenBatch):
    """`fn(micro_batch) -> [rows, P]`, or a pytree of them, over every live row, without gradient: [M, R, P]."""

    def one_mini_batch(_, mini_batch):
        live, rows = mini_batch
        return None, in_rows(fn, rows, live, config.micro_rows)

    _, out = jax.lax.scan(one_mini_batch, None, (batch.rows, batch.by_row()))
    return jax.tree.map(lambda x: mesh.constrain(x) * batch.policy_mask, out)


def reference_policy(config: LearnerConfig, state: TrainState) -> tuple[DecoderConfig, Params]:
    """The frozen policy of the KL term; with adapters it is the base without them."""
    if config.model.lora:
        return dataclasses.replace(config.model, lora=None), state.base
    return config.model, state.reference


def critic_values(config: LearnerConfig, critic: Params, policy: Params, rows: TokenBatch) -> Float[Array, "R P"]:
    """The critic's value before every policy token."""
    return values(config.critic, config.model, critic, policy, rows.tokens, rows.positions, rows.segment_ids, rows.index)


Places = tuple[Int[Array, "M R P"], Int[Array, "M R P"]] | None


def episode_places(config: LearnerConfig, batch: TokenBatch) -> Places:
    """The `episode_layout` of a batch in window context, whose turns are in any rows.

    None in chat context, in which every episode has a row of its own already.
    """
    return episode_layout(batch.policy_mask, batch.trajectory, batch.turn) if config.episode_policy_tokens else None


def by_episode(config: LearnerConfig, batch: TokenBatch, old: Old, places: Places) -> tuple[TokenBatch, Old]:
    """Both with the policy tokens of an episode in one row, [B, T]."""
    table = batch.returns.size, config.episode_policy_tokens

    def moved(x: Array) -> Array:
        return x.reshape(-1, x.shape[-1]) if places is None else jnp.zeros(table, x.dtype).at[places].set(x, mode="drop")

    fields = ("policy_mask", "trajectory", "turn", "reward", "valid")
    return batch._replace(**{name: moved(getattr(batch, name)) for name in fields}), jax.tree.map(moved, old)


def estimated(old: Old, found: Old, places: Places) -> Old:
    """`old` with the advantages, returns and mask of `found`, which has the layout of `by_episode`."""

    def moved(x: Array) -> Array:
        return x.reshape(old.mask.shape) if places is None else x.at[places].get(mode="fill", fill_value=0.0)

    return old._replace(advantage=moved(found.advantage), returns=moved(found.returns), mask=moved(found.mask))


def episode_layout(
    policy_mask: Float[Array, "*shape"], trajectory: Int[Array, "*shape"], turn: Int[Array, "*shape"]
) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"]]:
    """The place of each policy token in a table of episodes: (its trajectory, how many of its tokens come before).

    Turns may be in any rows, but the tokens of one are adjacent. Padding gets a place past the table's end.
    """
    size = policy_mask.size
    owner = jnp.where(policy_mask > 0, trajectory, size).ravel()
    order = jnp.lexsort((jnp.arange(size), turn.ravel(), owner))
    owner_in_order = owner[order]
    column = jnp.arange(size) - jnp.searchsorted(owner_in_order, owner_in_order)
    column = jnp.zeros_like(column).at[order].set(column)
    return owner.reshape(policy_mask.shape), column.reshape(policy_mask.shape)


def in_every_epoch(config: LearnerConfig, batch: TokenBatch, old: Old) -> Old:
    """`old` of the first epoch, [M, R, P], for the rows of all epochs, [E * M, R, P]: each epoch has the same tokens in other
    mini-batches and rows."""
    if config.epochs == 1:
        return old
    shape = batch.policy_mask.shape
    by_epoch = (x.reshape(config.epochs, -1, *shape[1:]) for x in (batch.policy_mask, batch.trajectory, batch.turn))
    layout = jax.vmap(episode_layout)(*by_epoch)
    table = batch.returns.size, config.episode_policy_tokens or shape[-1]

    def moved(x: Array) -> Array:
        laid_out = jnp.zeros(table, x.dtype).at[layout[0][0], layout[1][0]].set(x, mode="drop")
        return laid_out.at[layout].get(mode="fill", fill_value=0.0).reshape(shape)

    return jax.tree.map(moved, old)


def flat(batch: TokenBatch, old: Old) -> tuple[TokenBatch, Old]:
    """Both with the rows of all mini-batches side by side, [M * R, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), (batch.by_row(), old))


def episode_keys(batch: TokenBatch) -> Array:
    """A random key for each trajectory, from the run's seed and the episode's id."""
    return jax.vmap(functools.partial(jax.random.fold_in, keys.key(batch.seed, "learner")))(batch.episode)


# One update


def trained_part(state: TrainState) -> dict:
    """What updates change of a state, by field."""
    return {name: getattr(state, name) for name in TRAINED}


def first_update(config: LearnerConfig, old: Old) -> Bool[Array, " M"] | None:
    """Whether a mini-batch is the first with a token to train on; None unless gradient norms are measured, which needs it."""
    if not config.gradient_norms:
        return None
    made = old.mask.any(axis=(1, 2))
    return made & (jnp.cumsum(made) == 1)


def update_once(
    config: LearnerConfig,
    state: TrainState,
    rows: Rows,
    smoothing: Smoothing,
    hyper: Hyper,
    live: Int[Array, ""],
    first: Bool[Array, ""] | None = None,
) -> tuple[dict, tuple[Metrics, Metrics, Array]]:
    """What updates change, after one update by a mini-batch whose first `live` rows are not empty.

    Also returns metrics whose mean and metrics whose maximum over updates is reported, and whether there was a token to train
    on: rows without one (DAPO's dropped groups) are no reason for an update. The `gradient_parts` of the `first` update are among
    the maxima.
    """
    tokens = rows.old.mask.sum()
    live = jnp.where(tokens > 0, live, 0)
    gradient, metrics, maxima = policy_gradient(config, state, rows, smoothing, hyper, live)
    if first is not None:
        maxima |= gradient_parts(config, state, gradient, rows, smoothing, hyper, live, first)
    metrics = ratio_spread(metrics)
    metrics["entropy_change"] = metrics["entropy"] - (rows.weights.mean * rows.old.entropy).sum()
    with jax.named_scope("optimizer"):
        params, opt_state, metrics["grad_norm"], metrics["skipped_updates"] = guarded_update(
            config.optim, gradient, state.opt_state, state.params, hyper.lr, tokens
        )
    trained = trained_part(state) | {"params": params, "opt_state": opt_state}
    if config.critic_optim:
        gradient, critic_metrics = critic_gradient(config, state, rows, hyper, live)
        with jax.named_scope("critic_optimizer"):
            trained["critic"], trained["critic_opt_state"], _, skipped = guarded_update(
                config.critic_optim, gradient, state.critic_opt_state, state.critic, hyper.critic_lr, tokens
            )
        metrics |= critic_metrics
        metrics["skipped_updates"] = jnp.maximum(metrics["skipped_updates"], skipped)
    metrics |= {"beta": smoothing.beta, "lam": smoothing.lam}
    return trained, (metrics, maxima, tokens > 0)


@jax.named_scope("policy_gradient")
def policy_gradient(
    config: LearnerConfig, state: TrainState, rows: Rows, smoothing: Smoothing, hyper: Hyper, live: Int[Array, ""]
) -> tuple[Params, Metrics, Metrics]:
    """(gradient of the loss, metric sums, metric maxima) of a mini-batch."""
    objective = config.objective

    def loss(current: Current, rows: Rows):
        total, sums = epo_loss(current, rows, smoothing, hyper, objective)
        log_ratio = current.log_prob - rows.old.log_prob
        maxima = {
            name: jnp.where(rows.old.mask > 0, x, -jnp.inf).max()
            for name, x in (("ratio_max", log_ratio), ("ratio_min", -log_ratio))
        }
        return total, (sums, maxima)

    statistics, axes = functools.partial(current_policy, config, state), state_axes(config).params
    if config.episode_policy_tokens and objective.episode_means:
        return gradient_by_slopes(statistics, loss, state.params, rows, live, config.micro_rows, axes)
    return summed_gradients(
        lambda params, rows: loss(statistics(params, rows.batch), rows), state.params, rows, live, config.micro_rows, axes
    )


@jax.named_scope("gradient_parts")
def gradient_parts(
    config: LearnerConfig,
    state: TrainState,
    gradient: Params,
    rows: Rows,
    smoothing: Smoothing,
    hyper: Hyper,
    live: Int[Array, ""],
    first: Bool[Array, ""],
) -> Metrics:
    """Norms of the gradients of the loss without the entropy term and of the entropy term, and their cosine.

    `gradient` is that of the whole loss, which is linear in lam, so one more pass with lam = 0 separates its parts. Only the
    first update, by the policy that sampled, makes that pass; at others the numbers are -inf. The cosine is NaN if a norm is 0.
    """
    without = smoothing._replace(lam=jnp.zeros_like(smoothing.lam))
    policy_part, _, _ = policy_gradient(config, state, rows, without, hyper, jnp.where(first, live, 0))
    entropy_part = optax.tree.sub(gradient, policy_part)
    norms = optax.tree.norm(policy_part), optax.tree.norm(entropy_part)
    cosine = optax.tree.vdot(policy_part, entropy_part) / (norms[0] * norms[1])
    found = dict(zip(GRADIENT_PARTS, (*norms, cosine), strict=True))
    return {name: jnp.where(first, x, -jnp.inf) for name, x in found.items()}


@jax.named_scope("critic_gradient")
def critic_gradient(
    config: LearnerConfig, state: TrainState, rows: Rows, hyper: Hyper, live: Int[Array, ""]
) -> tuple[Params, Metrics]:
    """(gradient of the critic's loss, metric sums) of a mini-batch, beside the policy before this update."""
    policy = state.policy()

    def loss(critic: Params, rows: Rows):
        value = critic_values(config, critic, policy, rows.batch)
        by_token, clipped = value_loss(value, rows.old.value, rows.old.returns, hyper.value_clip)
        total = hyper.value_coef * (rows.weights.mean * by_token).sum()
        return total, ({"value_loss": total, "value_clip_fraction": (rows.weights.mean * clipped).sum()}, {})

    gradient, sums, _ = summed_gradients(loss, state.critic, rows, live, config.micro_rows, state_axes(config).critic)
    return gradient, sums


def current_policy(config: LearnerConfig, state: TrainState, params: Params, rows: TokenBatch) -> Current:
    """What the loss takes from the policy with trained weights `params` at every policy token."""
    objective, temperature = config.objective, config.temperature
    hidden, head = head_inputs(config.model, lora.join(state.base, params), rows)
    log_prob, token_entropy = head_statistics(config.model, hidden, head, rows.label, temperature, objective.entropy_top_p)
    if objective.kl != "full":
        return Current(log_prob, token_entropy)
    reference = head_inputs(*reference_policy(config, state), rows)
    divergence = head_divergence(config.model, hidden, head, *reference, temperature)
    return Current(log_prob, token_entropy, divergence.reshape(rows.label.shape))


# The KL controller


def next_kl_scale(
    config: LearnerConfig,
    state: TrainState,
    updates: tuple[Metrics, Metrics, Array],
    batch: TokenBatch,
    old: Old,
    hyper: Hyper,
) -> tuple[Float[Array, ""], Metrics]:
    """The scale of the KL coefficient in the next RL step, and this step's divergence and coefficient.

    `hyper.kl_coef` is the coefficient of this step. A divergence that is not finite leaves the scale as it is.
    """
    objective, (of_updates, _, made) = config.objective, updates
    if objective.kl == "none":
        return state.kl_scale, {}
    metrics = {"kl_coef": hyper.kl_coef}
    if objective.kl_place == "reward":
        kl = kl_estimate(old.log_prob, old.ref_log_prob, objective.kl)
        measured = metrics["kl"] = (kl * batch.policy_mask).sum() / batch.policy_mask.sum()
    else:
        sound = made & jnp.isfinite(of_updates["kl"])
        measured = jnp.where(sound, of_updates["kl"], 0.0).sum() / sound.sum()
    if objective.kl_controller == "fixed":
        return state.kl_scale, metrics
    moved = adaptive_kl_coef(state.kl_scale, measured, hyper.kl_target, hyper.kl_horizon, objective.num_trajectories)
    return jnp.where(jnp.isfinite(measured), moved, state.kl_scale), metrics
