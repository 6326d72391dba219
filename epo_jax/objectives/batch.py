"""The data of one RL step: token trajectories packed into rows of fixed shape.

Loss arrays hold policy tokens only (axis P). Observations are never trained on, so everything after the decoder (the head, the
losses, advantage estimation) skips them by construction.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Int, UInt


class TokenBatch(NamedTuple):
    """Packed trajectories, split into M mini-batches (those of each epoch, one after another) of at most R rows of T tokens, P
    policy tokens a row.

    A segment is one context of a trajectory: all of a conversation, or one turn with its window.

    Attributes:
        tokens, positions, segment_ids: the decoder's input; segments count from 1, 0 is padding.
        rows: live rows of each mini-batch; the rest is padding that the learner's loop never visits.
        index: column of the hidden state that predicts each policy token (the token before it).
        label: the policy tokens.
        policy_mask: 1.0 where there is a policy token.
        trajectory: index of the token's trajectory in the [N] arrays.
        turn: the token's turn in its trajectory.
        reward: the turn's reward on the turn's last token, 0 elsewhere.
        valid: 1.0 where the token's turn parsed into an action.
        behaviour_log_prob, behaviour_entropy: recorded when the token was sampled, nats.
        returns: undiscounted return of each trajectory.
        group: group of each trajectory.
        anchor: an id of the observation before each turn, equal within a group where the observations are (GiGPO).
        episode: id of each trajectory's episode.
        seed: the run's seed, from which the learner draws.
    """

    tokens: Int[Array, "M R T"]
    positions: Int[Array, "M R T"]
    segment_ids: Int[Array, "M R T"]
    rows: Int[Array, " M"]
    index: Int[Array, "M R P"]
    label: Int[Array, "M R P"]
    policy_mask: Float[Array, "M R P"]
    trajectory: Int[Array, "M R P"]
    turn: Int[Array, "M R P"]
    reward: Float[Array, "M R P"]
    valid: Float[Array, "M R P"]
    behaviour_log_prob: Float[Array, "M R P"]
    behaviour_entropy: Float[Array, "M R P"]
    returns: Float[Array, " N"]
    group: Int[Array, " N"]
    anchor: Int[Array, "N U"]
    episode: Int[Array, " N"]
    seed: UInt[Array, ""]

    def by_row(self) -> "TokenBatch":
        """The arrays that have rows; None in place of the others."""
        return self._replace(rows=None, returns=None, group=None, anchor=None, episode=None, seed=None)


_OF_TOKENS, _OF_POLICY_TOKENS = ("mini_batches", "rows", "row_tokens"), ("mini_batches", "rows", "row_policy_tokens")

# The logical axes (epo_jax/parallel/mesh.py) of each array.
BATCH_AXES = TokenBatch(
    tokens=_OF_TOKENS,
    positions=_OF_TOKENS,
    segment_ids=_OF_TOKENS,
    rows=("mini_batches",),
    index=_OF_POLICY_TOKENS,
    label=_OF_POLICY_TOKENS,
    policy_mask=_OF_POLICY_TOKENS,
    trajectory=_OF_POLICY_TOKENS,
    turn=_OF_POLICY_TOKENS,
    reward=_OF_POLICY_TOKENS,
    valid=_OF_POLICY_TOKENS,
    behaviour_log_prob=_OF_POLICY_TOKENS,
    behaviour_entropy=_OF_POLICY_TOKENS,
    returns=("trajectories",),
    group=("trajectories",),
    anchor=("trajectories", "turns"),
    episode=("trajectories",),
    seed=(),
)

# A batch without arrays: `NO_ARRAYS._replace(...)` has what a function reads.
NO_ARRAYS = TokenBatch(**dict.fromkeys(TokenBatch._fields))


class Old(NamedTuple):
    """What is known of every policy token before any update, all [..., P] and 0 off the mask.

    Attributes:
        log_prob: by the policy before this step's updates, nats.
        entropy: of that policy's distribution, nats; of its nucleus for SIREN.
        value: the critic's; 0 without one.
        ref_log_prob: by the reference policy; 0 without one.
        mask: 1 on the tokens to train on: before `estimate` all policy tokens, after it without those that DAPO drops.
        advantage: None before `estimate`.
        returns: the critic's target; None before `estimate`.
    """

    log_prob: Float[Array, "*rows P"]
    entropy: Float[Array, "*rows P"]
    value: Float[Array, "*rows P"]
    ref_log_prob: Float[Array, "*rows P"]
    mask: Float[Array, "*rows P"]
    advantage: Float[Array, "*rows P"] | None = None
    returns: Float[Array, "*rows P"] | None = None


class Weights(NamedTuple):
    """Every average of the loss as a weight per token, all [R, P].

    Attributes:
        policy: the average that `aggregation` names, for the KL loss.
        surrogate: the same, scaled by truncated importance and by the token control, for PPO's surrogate.
        divergence: of |log ratio|, for KL-Cov; else 0.
        entropy: for the entropy term.
        mean: the plain mean over policy tokens, for metrics.
    """

    policy: Float[Array, "R P"]
    surrogate: Float[Array, "R P"]
    divergence: Float[Array, "R P"]
    entropy: Float[Array, "R P"]
    mean: Float[Array, "R P"]


class Rows(NamedTuple):
    """The rows of a mini-batch with what the loss needs to know of them; a micro-batch is a slice along R."""

    batch: TokenBatch
    old: Old
    weights: Weights


class Current(NamedTuple):
    """What the loss takes from the current policy at every policy token, [R, P], nats.

    `full_kl` is the divergence from the reference over the whole vocabulary, for kl = "full" alone.
    """

    log_prob: Float[Array, "R P"]
    entropy: Float[Array, "R P"]
    full_kl: Float[Array, "R P"] | None = None
