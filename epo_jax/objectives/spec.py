"""What an objective consists of: coefficients (`Hyper`), choices (`ObjectiveConfig`), and the data they act on.

`Hyper`, made from the settings, is a pytree of traced leaves: everything that an ablation varies, so that a sweep is one vmap.
`ObjectiveConfig` is static: everything that changes the program.
"""

import dataclasses
from typing import Literal, NamedTuple

from jaxtyping import Array, Float, Int

from epo_jax.settings import table
from epo_jax.settings.hyper import Choices
from epo_jax.settings.hyper import Hyper as Hyper

Scalar = Float[Array, ""] | float | int
Step = Int[Array, ""] | int

# "none": the term is left out, where the config has algo.kl_coef = 0.
KLKind = Literal["none", table.KLKind]
Scope = Literal["token", "turn", "trajectory"]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Choices):
    """Everything that is static about an objective: the choices among the settings, and the fields below.

    The names are looked up in `registry`, which sets most of them from the name of the method.
    """

    # advantages
    estimator: str = "grpo"
    drop_uniform_groups: bool = False  # DAPO: groups whose returns are all equal are left out
    shaper: str = "none"  # of the advantages, by entropy
    # policy loss
    ratio_scope: Scope = "token"  # `trajectory` or `turn`: GSPO
    recompute_old_log_prob: bool = False  # before the update, by the learner, in place of what the sampler recorded
    truncated_importance: bool = False  # needs the two, so it recomputes them too
    token_control: str = "none"  # which tokens the surrogate treats differently
    # entropy
    entropy_term: str = "epo"
    coefficient: Literal["fixed", "target"] = "fixed"
    phase_steps: int | None = None  # K of the phase schedule; None = the run's own length
    released: bool = False  # advantages, averages and history as the reference implementation has them: `released_rows`
    # shapes
    num_trajectories: int = 1  # N
    max_turns: int = 1  # U
    max_tokens: int = 1  # divisor of `seq-mean-token-sum-norm`
    turn_tokens: int = 1  # tokens of a turn at most, for `released`
    mini_turns: int = 1  # turns of a mini-batch of `released`, a multiple of `micro_turns`
    micro_turns: int = 1  # turns of a micro-batch of `released`, each of which counts alike

    @property
    def episode_means(self) -> bool:
        """Whether the loss is no sum over tokens, as it compares or clips means over whole episodes."""
        return "trajectory" in (self.ratio_scope, self.penalty_scope)

    @property
    def own_old_log_prob(self) -> bool:
        """Whether the log-probabilities before the update are the learner's own."""
        return self.recompute_old_log_prob or self.truncated_importance

    @property
    def entropy_top_p(self) -> float | None:
        """The nucleus whose entropy the loss takes; None: all tokens of the vocabulary."""
        return self.nucleus if self.entropy_term == "siren" else None


class EntropyHistory(NamedTuple):
    """One mean entropy per earlier RL step, and per turn index when kept by turn.

    Attributes:
        values: [K, I] nats; row k belongs to RL step k. I = 1 (one number a step) or the number of turn indices.
        observed: [K, I] 1 where the step had tokens at that turn index, else 0.
        count: steps appended so far.
    """

    values: Float[Array, "K I"]
    observed: Float[Array, "K I"]
    count: Int[Array, ""]  # type: ignore[assignment]  # hides tuple.count


class Episodes(NamedTuple):
    """Sampled data from which advantages are estimated.

    All [B, T] but the last three (packed rows; where padding, `policy_mask`, `trajectory` and `turn` are 0).
    `reward` holds each turn's reward on the turn's last policy token; `valid` is 1 where the token's turn parsed;
    `value` is the critic's (zeros without one); `anchor` identifies the observation before each turn: equal integers in
    [0, N * U) mean the same observation of the same group (GiGPO; zeros otherwise).
    """

    policy_mask: Float[Array, "B T"]
    trajectory: Int[Array, "B T"]
    turn: Int[Array, "B T"]
    reward: Float[Array, "B T"]
    valid: Float[Array, "B T"]
    value: Float[Array, "B T"]
    log_prob: Float[Array, "B T"]
    ref_log_prob: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    returns: Float[Array, " N"]
    group: Int[Array, " N"]
    anchor: Int[Array, "N U"]


class LossRows(NamedTuple):
    """A mini-batch as the loss sees it, all [B, T]; slice or reshape along B for micro-batches."""

    policy_mask: Float[Array, "B T"]
    trajectory: Int[Array, "B T"]
    turn: Int[Array, "B T"]
    old_log_prob: Float[Array, "B T"]
    ref_log_prob: Float[Array, "B T"]
    advantage: Float[Array, "B T"]
    weight: Float[Array, "B T"]  # of the KL loss: the aggregation asked for
    surrogate_weight: Float[Array, "B T"]  # the same, less what token control and importance sampling take away
    divergence_weight: Float[Array, "B T"]  # of |log ratio|, where KL-Cov asks for it
    entropy_weight: Float[Array, "B T"]  # of the entropy term
    mean_weight: Float[Array, "B T"]  # plain mean over policy tokens, for metrics


class Smoothing(NamedTuple):
    """What the entropy term needs to know of the run so far.

    Attributes:
        center: [I] the corridor's centre in nats; `known` [I] is 1 where there is a history to centre it on.
        beta: phase weight.
        lam: weight of the entropy term at this step.
        batch_entropy: the mini-batch's mean entropy as it was sampled.
    """

    center: Float[Array, " I"]
    known: Float[Array, " I"]
    beta: Float[Array, ""]
    lam: Float[Array, ""]
    batch_entropy: Float[Array, ""]
