"""One RL step as one compiled program: TrainState in, TrainState out.

    make_train_step(config, mesh) -> (state, batch, hyper) -> (state, metrics)

Inside: advantages, then for each epoch and mini-batch a loop over micro-batches that sums gradients, then one optimiser
update. The loop stops at the last live row, so shapes never change and padding costs nothing. `step_function` is the same
without jit, donation and mesh: a pure function, to be mapped over members of a sweep.

On a mesh every micro-batch is shared out by rows. What each device keeps of the weights and their moments, mesh.py says;
advantages and the weights of averages, a few numbers a token, every device computes for itself.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from epo_jax.common import keys
from epo_jax.models import lora
from epo_jax.models.decoder import DecoderConfig, Params, bind
from epo_jax.models.value import values
from epo_jax.objectives import entropy
from epo_jax.objectives.batch import BATCH_AXES, TokenBatch
from epo_jax.objectives.head import fused_full_kl, fused_log_prob_entropy
from epo_jax.objectives.loss import Episodes, Estimate, Hyper, LossRows, epo_loss, estimate, loss_rows, record, smoothing_terms
from epo_jax.objectives.policy import adaptive_kl_coef, kl_estimate
from epo_jax.objectives.value import value_loss
from epo_jax.parallel import mesh
from epo_jax.parity import released_rows
from epo_jax.training.micro_batches import gradient_by_slopes, in_rows, summed_gradients
from epo_jax.training.optim import guarded_update
from epo_jax.training.state import LearnerConfig, TrainState, state_axes, state_shardings

Metrics = dict[str, Float[Array, ""]]


class Inputs(NamedTuple):
    """What the models read of some rows; the fields are those of `TokenBatch`."""

    tokens: Int[Array, "R T"]
    positions: Int[Array, "R T"]
    segment_ids: Int[Array, "R T"]
    index: Int[Array, "R P"]
    label: Int[Array, "R P"]


class Rows(NamedTuple):
    """One mini-batch, all leaves [R, ...]; a micro-batch is a slice along R."""

    inputs: Inputs
    loss: LossRows
    old_value: Float[Array, "R P"]
    returns: Float[Array, "R P"]


def batch_shardings(on: Mesh) -> TokenBatch:
    """The sharding of each array of a batch."""
    return TokenBatch(*(NamedSharding(on, mesh.spec(*axes)) for axes in BATCH_AXES))


def first_epoch(batch: TokenBatch, config: LearnerConfig) -> TokenBatch:
    """The mini-batches of the first pass over the data, in which every token is once."""
    if config.epochs == 1 or config.objective.released:
        return batch
    count = batch.rows.shape[0] // config.epochs
    return batch._replace(rows=batch.rows[:count], **{k: x[:count] for k, x in batch.by_row()._asdict().items() if x is not None})


def in_every_epoch(tree, batch: TokenBatch, config: LearnerConfig):
    """Arrays by token of the first epoch, [M, R, P], for the rows of all epochs, [E * M, R, P]: each epoch has the same tokens in
    other mini-batches and rows."""
    shape = batch.policy_mask.shape
    by_epoch = (x.reshape(config.epochs, -1, *shape[1:]) for x in (batch.policy_mask, batch.trajectory, batch.turn))
    layout = jax.vmap(episode_layout)(*by_epoch)
    table = batch.returns.size, config.episode_policy_tokens or shape[-1]

    def moved(x: Array) -> Array:
        laid_out = jnp.zeros(table, x.dtype).at[layout[0][0], layout[1][0]].set(x, mode="drop")
        return laid_out.at[layout].get(mode="fill", fill_value=0.0).reshape(shape)

    return jax.tree.map(moved, tree)


def episode_layout(
    policy_mask: Float[Array, "*shape"], trajectory: Int[Array, "*shape"], turn: Int[Array, "*shape"]
) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"]]:
    """Where each policy token stands in a table of episodes: (its trajectory, how many of its tokens come before).

    Turns may lie in any rows; the tokens of one lie side by side. Padding stands past the table's end.
    """
    size = policy_mask.size
    owner = jnp.where(policy_mask > 0, trajectory, size).ravel()
    order = jnp.lexsort((jnp.arange(size), turn.ravel(), owner))
    owner_in_order = owner[order]
    column = jnp.arange(size) - jnp.searchsorted(owner_in_order, owner_in_order)
    column = jnp.zeros_like(column).at[order].set(column)
    return owner.reshape(policy_mask.shape), column.reshape(policy_mask.shape)


def head_inputs(
    model: DecoderConfig, params: Params, rows: Inputs
) -> tuple[Float[Array, "N D"], Float[Array, "V D"]]:
    """The hidden states that predict the policy tokens, rows flattened (N = R * P), and the output embedding."""
    module = bind(model, params)
    hidden = module(rows.tokens, rows.positions, rows.segment_ids)
    chosen = jnp.take_along_axis(hidden, rows.index[..., None], axis=1)
    head = mesh.at_use(module.output_embedding(), "vocab", "embed")
    return mesh.constrain(chosen.reshape(-1, chosen.shape[-1]), "tokens"), head


def policy_statistics(
    model: DecoderConfig, params: Params, rows: Inputs, temperature: float, top_p: float | None = None
) -> tuple[Float[Array, "R P"], Float[Array, "R P"]]:
    """Log-probability of every policy token and entropy of its distribution (of its nucleus with `top_p`), nats."""
    return head_statistics(model, *head_inputs(model, params, rows), rows.label, temperature, top_p)


def head_statistics(
    model: DecoderConfig,
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    label: Int[Array, "R P"],
    temperature: float,
    top_p: float | None,
) -> tuple[Float[Array, "R P"], Float[Array, "R P"]]:
    """`fused_log_prob_entropy` of each device's own tokens, in the type of `hidden`.

    Gradients of the head are added up over devices once, not chunk by chunk, and in the head's own type: it comes in float32
    and is rounded here, where each device is alone.
    """

    def own(hidden, head, label):
        head = head.astype(hidden.dtype)
        return fused_log_prob_entropy(hidden, head, label, temperature, top_p=top_p, unused=model.unused_ids)

    flat = mesh.locally(own, (("tokens",), (), ("tokens",)), ("tokens",), mesh.ROWS)(hidden, head, label.ravel())
    return tuple(x.reshape(label.shape) for x in flat)


def head_divergence(
    model: DecoderConfig,
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    ref_hidden: Float[Array, "N D"],
    ref_head: Float[Array, "V D"],
    temperature: float,
) -> Float[Array, " N"]:
    """`fused_full_kl` of each device's own tokens; heads as in `head_statistics`."""

    def own(hidden, head, ref_hidden, ref_head):
        head, ref_head = head.astype(hidden.dtype), ref_head.astype(ref_hidden.dtype)
        return fused_full_kl(hidden, head, ref_hidden, ref_head, temperature, unused=model.unused_ids)

    axes = ("tokens",), (), ("tokens",), ()
    return mesh.locally(own, axes, ("tokens",), mesh.ROWS)(hidden, head, ref_hidden, ref_head)


def inputs_of(batch: TokenBatch, m: Int[Array, ""]) -> Inputs:
    """What the models read of mini-batch `m`."""
    return Inputs(*(x[m] for x in (batch.tokens, batch.positions, batch.segment_ids, batch.index, batch.label)))


def advantage_statistics(estimated: Estimate) -> Metrics:
    """Over the policy tokens that are trained on; without any, extremes are not finite and the rest is 0."""
    advantage, mask = estimated.advantage, estimated.policy_mask
    tokens = jnp.maximum(mask.sum(), 1.0)
    mean = (advantage * mask).sum() / tokens
    return {
        "advantage_mean": mean,
        "advantage_std": jnp.sqrt((jnp.square(advantage - mean) * mask).sum() / tokens),
        "advantage_rms": jnp.sqrt((jnp.square(advantage) * mask).sum() / tokens),
        "advantage_min": jnp.where(mask > 0, advantage, jnp.inf).min(),
        "advantage_max": jnp.where(mask > 0, advantage, -jnp.inf).max(),
    }


TrainStep = Callable[[TrainState, TokenBatch, Hyper], tuple[TrainState, Metrics]]


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
    """One RL step as a pure function."""
    objective, micro_rows = config.objective, config.micro_rows
    axes = state_axes(config)
    plain_model = dataclasses.replace(config.model, lora=None)

    def per_policy_token(fn: Callable, batch: TokenBatch):
        """`fn(micro_batch) -> [rows, P]`, or a pytree of them, over every live row, without gradient: [M, R, P]."""

        def one_mini(_, m):
            return None, in_rows(fn, inputs_of(batch, m), batch.rows[m], micro_rows)

        _, out = jax.lax.scan(one_mini, None, jnp.arange(batch.rows.shape[0]))
        return jax.tree.map(lambda x: mesh.constrain(x) * batch.policy_mask, out)

    def before_update(state: TrainState, batch: TokenBatch) -> tuple[Float[Array, "M R P"], Float[Array, "M R P"], Metrics]:
        """Log-probability and entropy of the data before this step's updates: what the sampler recorded, or where that
        will not do (it saw another arithmetic, or the whole distribution) the learner's own; and how far the two are apart."""
        log_prob, token_entropy = batch.behaviour_log_prob, batch.behaviour_entropy
        if not objective.own_old_log_prob and objective.entropy_top_p is None:
            return log_prob, token_entropy, {}
        own = per_policy_token(
            lambda micro: policy_statistics(config.model, state.policy(), micro, config.temperature, objective.entropy_top_p),
            batch,
        )
        gap = jnp.abs(own[0] - log_prob)
        metrics = {"sampler_gap_mean": gap.sum() / jnp.maximum(batch.policy_mask.sum(), 1.0), "sampler_gap_max": gap.max()}
        log_prob = own[0] if objective.own_old_log_prob else log_prob
        token_entropy = own[1] if objective.entropy_top_p is not None else token_entropy
        return log_prob, token_entropy, metrics

    def reference_policy(state: TrainState) -> tuple[DecoderConfig, Params]:
        return (plain_model, state.base) if config.model.lora else (config.model, state.reference)

    def reference_log_prob(state: TrainState, batch: TokenBatch) -> Float[Array, "M R P"]:
        if not config.reference or objective.kl == "full":
            return jnp.zeros_like(batch.policy_mask)
        return per_policy_token(
            lambda micro: policy_statistics(*reference_policy(state), micro, config.temperature)[0], batch
        )

    def critic_values(state: TrainState, batch: TokenBatch) -> Float[Array, "M R P"]:
        if not config.critic_optim:
            return jnp.zeros_like(batch.policy_mask)
        policy = state.policy()
        return per_policy_token(lambda micro: values(config.critic, config.model, state.critic, policy, *micro[:4]), batch)

    def advantages(batch: TokenBatch, data: dict, hyper: Hyper, key) -> tuple[Estimate, Float[Array, "M K"] | None]:
        """The estimate, and with the release's arithmetic what each turn weighs in each of its mini-batches."""
        shape = batch.policy_mask.shape
        by_token = (
            batch.policy_mask, batch.trajectory, batch.turn, batch.reward, batch.valid,
            data["value"], data["old_log_prob"], data["ref_log_prob"], data["old_entropy"],
        )  # fmt: skip
        layout = None
        if config.episode_policy_tokens:
            layout = episode_layout(batch.policy_mask, batch.trajectory, batch.turn)
            table = batch.returns.size, config.episode_policy_tokens
            laid_out = [jnp.zeros(table, x.dtype).at[layout].set(x, mode="drop") for x in by_token]
        else:
            laid_out = [x.reshape(-1, shape[-1]) for x in by_token]
        episodes = Episodes(*laid_out, returns=batch.returns, group=batch.group, anchor=batch.anchor)
        if objective.released:
            found, turn_weights = released_rows.estimate(episodes, key, hyper, objective)
        else:
            found, turn_weights = estimate(episodes, hyper, objective), None
        if layout is not None:
            found = jax.tree.map(lambda x: x.at[layout].get(mode="fill", fill_value=0.0), found)
        else:
            found = jax.tree.map(lambda x: x.reshape(shape), found)
        return found, turn_weights

    @jax.named_scope("train_step")
    def train_step(state: TrainState, batch: TokenBatch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        hyper = hyper._replace(kl_coef=hyper.kl_coef * state.kl_scale)
        batch = batch._replace(**{k: mesh.constrain(x) for k, x in batch._asdict().items() if k not in Inputs._fields})
        first = first_epoch(batch, config)
        old = {"ref_log_prob": reference_log_prob(state, first), "value": critic_values(state, first)}
        old["old_log_prob"], old["old_entropy"], gap = before_update(state, first)
        key = keys.key(batch.seed, "learner")
        episode_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(batch.episode)
        estimated, turn_weights = advantages(first, old, hyper, jax.random.fold_in(key, state.step))

        # A corridor is built from earlier steps alone; the release has the current one in it.
        by_token = (old["old_entropy"], first.policy_mask, first.trajectory, first.turn)
        history = record(state.history, *(x.reshape(-1, x.shape[-1]) for x in by_token), hyper, objective)
        seen = history if objective.released else state.history

        mini_batches, by_row = jnp.arange(batch.rows.shape[0]), (batch.by_row(), old, estimated)
        if objective.released:
            if batch.rows.shape[0] != 1:
                raise ValueError("An arm with +released cuts its own mini-batches: pack with mini_batches=1.")
            mini_batches = jnp.zeros(config.epochs * turn_weights.shape[0], jnp.int32)
        elif config.epochs > 1:
            by_row = batch.by_row(), *in_every_epoch((old, estimated), batch, config)

        def update(carry, step_and_mini):
            params, opt_state, critic, critic_opt_state = carry
            i, m = step_and_mini
            b, known, estimates = jax.tree.map(lambda x: x[m], by_row)
            weight = None
            if objective.released:
                turns = turn_weights[i % turn_weights.shape[0]]
                weight = turns[b.trajectory * objective.max_turns + b.turn] * estimates.policy_mask
                estimates = estimates._replace(policy_mask=(weight > 0).astype(weight.dtype))
            # Rows without a token to train on (DAPO's dropped groups) are no reason for an update.
            tokens = estimates.policy_mask.sum()
            live = jnp.where(tokens > 0, batch.rows[m], 0)
            weighted = loss_rows(
                estimates.policy_mask, b.trajectory, b.turn, known["old_log_prob"], known["ref_log_prob"],
                estimates.advantage, hyper, objective, behaviour_log_prob=b.behaviour_log_prob,
                behaviour_entropy=known["old_entropy"], episode_keys=episode_keys, given_weight=weight,
            )  # fmt: skip
            terms = smoothing_terms(
                seen, state.step, config.total_steps, known["old_entropy"], weighted, hyper, objective
            )
            rows = Rows(inputs_of(batch, m), weighted, known["value"], estimates.returns)
            if objective.released:  # rows without a turn of this mini-batch are not visited
                needed = weight.any(axis=1)
                live, rows = needed.sum(), jax.tree.map(lambda x: x[jnp.argsort(~needed, stable=True)], rows)

            def statistics(params, inputs: Inputs) -> dict[str, Float[Array, "R P"]]:
                """What the loss takes of the current policy at every policy token."""
                label = inputs.label
                head = head_inputs(config.model, lora.join(state.base, params), inputs)
                log_prob, token_entropy = head_statistics(config.model, *head, label, config.temperature, objective.entropy_top_p)
                found = {"log_prob": log_prob, "token_entropy": token_entropy}
                if objective.kl == "full":
                    reference = head_inputs(*reference_policy(state), inputs)
                    found["full_kl"] = head_divergence(config.model, *head, *reference, config.temperature).reshape(label.shape)
                return found

            def loss_of(found: dict[str, Float[Array, "R P"]], rows: LossRows):
                loss, sums = epo_loss(**found, rows=rows, smoothing=terms, hyper=hyper, objective=objective)
                log_ratio = found["log_prob"] - rows.old_log_prob
                maxima = {
                    name: jnp.where(rows.policy_mask > 0, x, -jnp.inf).max()
                    for name, x in (("ratio_max", log_ratio), ("ratio_min", -log_ratio))
                }
                return loss, (sums, maxima)

            policy = lora.join(state.base, params)
            if config.episode_policy_tokens and objective.episode_means:
                gradient, metrics, maxima = gradient_by_slopes(statistics, loss_of, params, rows, live, micro_rows, axes.params)
            else:
                gradient, metrics, maxima = summed_gradients(
                    lambda params, micro: loss_of(statistics(params, micro.inputs), micro.loss),
                    params, rows, live, micro_rows, axes.params,
                )  # fmt: skip
            metrics["entropy_change"] = metrics["entropy"] - (weighted.mean_weight * known["old_entropy"]).sum()
            params, opt_state, metrics["grad_norm"], metrics["skipped_updates"] = guarded_update(
                config.optim, gradient, opt_state, params, hyper.lr, state.step, tokens
            )
            if config.critic_optim:

                def critic_objective(critic, micro: Rows):
                    value = values(config.critic, config.model, critic, policy, *micro.inputs[:4])
                    loss, clipped = value_loss(value, micro.old_value, micro.returns, hyper.value_clip)
                    total = hyper.value_coef * (micro.loss.mean_weight * loss).sum()
                    return total, ({"value_loss": total, "value_clip_fraction": (micro.loss.mean_weight * clipped).sum()}, {})

                gradient, critic_metrics, _ = summed_gradients(critic_objective, critic, rows, live, micro_rows, axes.critic)
                critic, critic_opt_state, _, skipped = guarded_update(
                    config.critic_optim, gradient, critic_opt_state, critic, hyper.critic_lr, state.step, tokens
                )
                metrics |= critic_metrics
                metrics["skipped_updates"] = jnp.maximum(metrics["skipped_updates"], skipped)
            metrics |= {"beta": terms.beta, "lam": terms.lam}
            return (params, opt_state, critic, critic_opt_state), (metrics, maxima, tokens > 0)

        carry = (state.params, state.opt_state, state.critic, state.critic_opt_state)
        carry, (of_updates, maxima, done) = jax.lax.scan(update, carry, (jnp.arange(mini_batches.size), mini_batches))
        updates = done.sum()
        metrics = jax.tree.map(lambda x: jnp.where(done, x, 0.0).sum() / jnp.maximum(updates, 1), of_updates)
        last = jnp.where(done, jnp.arange(done.size), 0).max()
        center = entropy.center(seen, objective.history, hyper.window, hyper.ema_decay)
        policy_tokens = jnp.maximum(first.policy_mask.sum(), 1.0)
        metrics |= {
            "updates": updates.astype(jnp.float32),
            "skipped_updates": of_updates["skipped_updates"].sum(),
            "behaviour_entropy": (first.behaviour_entropy * first.policy_mask).sum() / policy_tokens,
            "entropy_change": of_updates["entropy_change"][last],
            "corridor_center": (center.value * center.known).sum() / jnp.maximum(center.known.sum(), 1.0),
            "ratio_max": jnp.exp(maxima["ratio_max"].max()),
            "ratio_min": jnp.exp(-maxima["ratio_min"].max()),
            **advantage_statistics(estimated),
            **gap,
        }
        kl_scale = state.kl_scale
        if objective.kl != "none":
            metrics["kl_coef"] = hyper.kl_coef
            if objective.kl_place == "reward":
                kl = kl_estimate(old["old_log_prob"], old["ref_log_prob"], objective.kl)
                measured = metrics["kl"] = (kl * first.policy_mask).sum() / first.policy_mask.sum()
            else:
                sound = done & jnp.isfinite(of_updates["kl"])
                measured = jnp.where(sound, of_updates["kl"], 0.0).sum() / sound.sum()
            if objective.kl_controller == "adaptive":
                moved = adaptive_kl_coef(kl_scale, measured, hyper.kl_target, hyper.kl_horizon, objective.num_trajectories)
                kl_scale = jnp.where(jnp.isfinite(measured), moved, kl_scale)
        return TrainState(state.step + 1, *carry, state.reference, history, kl_scale, state.base), metrics

    return train_step
