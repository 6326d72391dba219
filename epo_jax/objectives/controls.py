"""Entropy terms, and the entropy controls that people use next to EPO or instead of it.

A control can act in four places, each with one signature, so that `registry` can list the controls by name:

    shaper(advantage, batch, old, hyper, objective) -> advantage                         once, before training
    token control(rows, episode_keys, hyper) -> rows                                     once per mini-batch
    entropy term(entropy, rows, smoothing, hyper, objective) -> (loss, penalty)          in the loss
    coefficient(history, batch_entropy, hyper) -> lam                                    once per mini-batch

Whatever depends on a whole mini-batch (a mean inside a square, a quantile) is computed from the sampled entropies, so the loss
stays a sum over tokens and no split into micro-batches changes it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from epo_jax.objectives import policy
from epo_jax.objectives.advantages import turn_sums
from epo_jax.objectives.batch import Old, Rows, TokenBatch
from epo_jax.objectives.entropy import corridor_penalty
from epo_jax.objectives.spec import EntropyHistory, Hyper, ObjectiveConfig, Smoothing

TermAndPenalty = tuple[Float[Array, ""], Float[Array, "B T"]]


# Entropy terms


def smoothness_penalty(
    entropy: Float[Array, "B T"], rows: Rows, smoothing: Smoothing, hyper: Hyper, objective: ObjectiveConfig
) -> Float[Array, "B T"]:
    """The corridor penalty P per token (alpha not included), 0 before there is a history and before the gate's turn."""
    index = rows.batch.turn if objective.history_index == "turn" else jnp.zeros_like(rows.batch.turn)
    center, active = smoothing.center[index], smoothing.known[index]
    if objective.turn_gate:
        active *= (rows.batch.turn >= objective.max_turns // 2).astype(jnp.float32)
    if objective.penalty_scope == "batch":
        # The side of the corridor comes from the mean as sampled; on that side P is linear in every token's entropy.
        measured = entropy + jax.lax.stop_gradient(smoothing.batch_entropy - entropy)
    else:
        measured = policy.scope_mean(
            entropy, rows.weights.entropy, rows.batch.trajectory, rows.batch.turn,
            objective.num_trajectories, objective.max_turns, objective.penalty_scope,
        )  # fmt: skip
    return active * corridor_penalty(measured, center, hyper.kappa_l, hyper.kappa_r, objective.penalty)


def epo_term(
    entropy: Float[Array, "B T"], rows: Rows, smoothing: Smoothing, hyper: Hyper, objective: ObjectiveConfig
) -> TermAndPenalty:
    """EPO: -lam * (L_H - beta * L_smooth), L_H and L_smooth the weighted means of H and of alpha * P (eq. 2-6)."""
    penalty = smoothness_penalty(entropy, rows, smoothing, hyper, objective)
    inner = entropy - smoothing.beta * hyper.alpha * penalty
    return -smoothing.lam * (rows.weights.entropy * inner).sum(), penalty


def siren_term(
    entropy: Float[Array, "B T"], rows: Rows, smoothing: Smoothing, hyper: Hyper, objective: ObjectiveConfig
) -> TermAndPenalty:
    """SIREN (arXiv 2509.25133): lam * (mean entropy - anchor)^2 over each episode's tokens of peak entropy, whose anchor
    is the first step's mean (history `initial`). The square is linearised at the mean as sampled."""
    gap = (smoothing.batch_entropy - smoothing.center[0]) * smoothing.known[0]
    square = jnp.square(gap) + 2.0 * gap * (entropy - smoothing.batch_entropy)
    return smoothing.lam * (rows.weights.entropy * square).sum(), jnp.zeros_like(entropy)


def peak_mask(
    entropy: Float[Array, "B T"],
    policy_mask: Float[Array, "B T"],
    trajectory: Int[Array, "B T"],
    num_trajectories: int,
    quantile: Float[Array, ""] | float,
) -> Float[Array, "B T"]:
    """1 on each trajectory's policy tokens at or above its own quantile of entropy, at least one (with ties, all)."""
    owner = jnp.where(policy_mask > 0, trajectory, num_trajectories).ravel()
    size = jax.ops.segment_sum(jnp.ones(owner.size, jnp.int32), owner, num_trajectories + 1)
    order = jnp.lexsort((-entropy.ravel(), owner))
    rank = jnp.arange(owner.size) - (jnp.cumsum(size) - size)[owner[order]]
    count = jnp.maximum(jnp.floor((1.0 - quantile) * size + 1e-4).astype(jnp.int32), 1)[owner[order]]
    ordered = jnp.where(rank < count, entropy.ravel()[order], jnp.inf)
    least = jax.ops.segment_min(ordered, owner[order], num_trajectories + 1)
    return jnp.where((entropy.ravel() >= least[owner]) & (owner < num_trajectories), 1.0, 0.0).reshape(entropy.shape)


def largest(x: Float[Array, "B T"], mask: Float[Array, "B T"], fraction: Float[Array, ""] | float):
    """1 on the given fraction of masked entries with the largest x, at least one (with ties, all of them)."""
    ordered = jnp.sort(jnp.where(mask > 0, x, -jnp.inf).ravel())[::-1]
    count = jnp.maximum(jnp.floor(fraction * mask.sum() + 1e-4).astype(jnp.int32), 1)
    return jnp.where((x >= ordered[count - 1]) & (mask > 0), 1.0, 0.0)


# Coefficients


def fixed_coefficient(history: EntropyHistory, batch_entropy: Float[Array, ""], hyper: Hyper) -> Float[Array, ""]:
    """lam, the same at every step."""
    return jnp.asarray(hyper.lam, jnp.float32)


def target_coefficient(history: EntropyHistory, batch_entropy: Float[Array, ""], hyper: Hyper) -> Float[Array, ""]:
    """Adaptive coefficient (Skywork-OR1, arXiv 2505.22312): from `lam`, up by `target_delta` after a step whose entropy
    was below `target_entropy`, down after one above, kept in [0, `target_cap`]; off while the mini-batch's own entropy, as
    sampled, is above the target.

    A function of the history alone: a resumed run continues with the same coefficient and there is no other state.
    """

    def move(coefficient, entry):
        mean, observed = entry
        moved = coefficient + hyper.target_delta * jnp.sign(hyper.target_entropy - mean)
        return jnp.where(observed > 0, jnp.clip(moved, 0.0, hyper.target_cap), coefficient), None

    means = (history.values * history.observed).sum(1) / jnp.maximum(history.observed.sum(1), 1.0)
    coefficient, _ = jax.lax.scan(move, jnp.asarray(hyper.lam, jnp.float32), (means, history.observed.max(1)))
    return jnp.where(batch_entropy > hyper.target_entropy, 0.0, coefficient)


# Shapers


def entropy_shaped(
    advantage: Float[Array, "B T"], batch: TokenBatch, old: Old, hyper: Hyper, objective: ObjectiveConfig
) -> Float[Array, "B T"]:
    """EA (arXiv 2506.14758): A + min(shaping_scale * H, |A| / shaping_kappa), H as sampled and without gradient."""
    bonus = jax.lax.stop_gradient(hyper.shaping_scale * old.entropy)
    return advantage + jnp.minimum(bonus, jnp.abs(advantage) / hyper.shaping_kappa)


def empg(
    advantage: Float[Array, "B T"], batch: TokenBatch, old: Old, hyper: Hyper, objective: ObjectiveConfig
) -> Float[Array, "B T"]:
    """EMPG (arXiv 2509.09265): confident turns weigh more, and turns that lead to a confident one get a bonus.

    With h the turn's mean entropy scaled to [0, 1] over the batch: A g(h_t) + empg_bonus f(h_{t+1}), f(h) =
    exp(-empg_sharpness h), g = f over its mean, then centered over turns. The last turn has no bonus.
    """
    shape, index = (objective.num_trajectories, objective.max_turns), (batch.trajectory, batch.turn)
    tokens = turn_sums(old.mask, *index, shape)
    present = tokens > 0
    entropy = turn_sums(old.entropy * old.mask, *index, shape) / jnp.maximum(tokens, 1.0)
    low = jnp.where(present, entropy, jnp.inf).min()
    high = jnp.where(present, entropy, -jnp.inf).max()
    clarity = jnp.where(present, jnp.exp(-hyper.empg_sharpness * (entropy - low) / (high - low + 1e-8)), 0.0)
    scale = clarity * present.sum().astype(jnp.float32) / (clarity.sum() + 1e-8)
    bonus = jnp.pad(clarity[:, 1:], ((0, 0), (0, 1)))
    shaped = advantage * scale[index] + hyper.empg_bonus * bonus[index]
    by_turn = turn_sums(shaped * old.mask, *index, shape) / jnp.maximum(tokens, 1.0)
    return shaped - by_turn.sum() / jnp.maximum(present.sum(), 1)


# Token controls


def covariance(rows: Rows) -> Float[Array, "B T"]:
    """Each token's share of the covariance of log-probability and advantage (arXiv 2505.22617), as sampled."""
    log_prob = rows.old.log_prob - (rows.old.log_prob * rows.weights.mean).sum()
    return log_prob * (rows.old.advantage - (rows.old.advantage * rows.weights.mean).sum())


def uniforms(rows: Rows, episode_keys: Key[Array, " N"]) -> Float[Array, "B T"]:
    """A uniform number for every policy token, from its episode's key, its turn and its position in the turn alone, so that it
    depends neither on the rows nor on the mini-batch."""
    before = jnp.cumsum(rows.old.mask, axis=1) - rows.old.mask
    starts = (jnp.diff(rows.batch.trajectory, axis=1, prepend=-1) != 0) | (jnp.diff(rows.batch.turn, axis=1, prepend=-1) != 0)
    position = (before - jax.lax.cummax(jnp.where(starts, before, 0.0), axis=1)).astype(jnp.int32)

    def draw(trajectory, turn, position):
        key = jax.random.fold_in(jax.random.fold_in(episode_keys[trajectory], turn), position)
        return jax.random.uniform(key)

    return jax.vmap(jax.vmap(draw))(rows.batch.trajectory, rows.batch.turn, position)


def clip_cov(rows: Rows, episode_keys: Key[Array, " N"], hyper: Hyper) -> Rows:
    """Clip-Cov (arXiv 2505.22617): a random `cov_fraction` of the tokens, drawn from those with covariance in
    (cov_low, cov_high), gives no policy gradient."""
    share = covariance(rows)
    band = jnp.where((share > hyper.cov_low) & (share < hyper.cov_high), rows.old.mask, 0.0)
    drawn = largest(uniforms(rows, episode_keys) * band, rows.old.mask, hyper.cov_fraction) * band
    return rows._replace(weights=rows.weights._replace(surrogate=rows.weights.surrogate * (1.0 - drawn)))


def kl_cov(rows: Rows, episode_keys: Key[Array, " N"] | None, hyper: Hyper) -> Rows:
    """KL-Cov (arXiv 2505.22617): the `cov_fraction` of tokens with the largest covariance pays `cov_coef` *
    |log pi - log pi_old| (`policy.size`). The method disables PPO's clip, which this divergence replaces."""
    chosen = largest(covariance(rows), rows.old.mask, hyper.cov_fraction)
    return rows._replace(weights=rows.weights._replace(divergence=rows.weights.policy * chosen * hyper.cov_coef))
