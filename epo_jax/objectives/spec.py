"""What an objective is made of: coefficients (`Hyper`), choices (`ObjectiveConfig`), and the data they act on.

`Hyper` is a pytree of traced leaves: everything an ablation may vary, so that a sweep is one vmap. `ObjectiveConfig` is
static: everything that changes the program.
"""

import dataclasses
from typing import Literal, NamedTuple

from jaxtyping import Array, Float, Int

Scalar = Float[Array, ""] | float | int
Step = Int[Array, ""] | int

Aggregation = Literal[
    "trajectory", "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]
KLKind = Literal["none", "k1", "abs", "k2", "k3", "full"]
Scope = Literal["token", "turn", "trajectory"]
Penalty = Literal["hinge", "indicator"]
PenaltyScope = Literal["token", "turn", "trajectory", "batch"]
HistoryMode = Literal["cumulative", "sliding", "ema", "initial"]
Phase = Literal["exponential", "constant", "released"]


class Hyper(NamedTuple):
    """Coefficients. Defaults: the paper's for ALFWorld, the cited paper's for the rest."""

    # EPO
    lam: Scalar = 0.001  # weight of the entropy term
    alpha: Scalar = 0.1  # weight of the corridor penalty inside it
    kappa_l: Scalar = 0.0  # the corridor, in multiples of the mean past entropy
    kappa_r: Scalar = 2.0
    gamma: Scalar = 3.0  # rate of the phase schedule
    window: Scalar = 10.0  # RL steps, for history `sliding`
    ema_decay: Scalar = 0.9  # per RL step, for history `ema`
    turn_decay: Scalar = 0.0  # EPO-Decay: weight of turn t is exp(-turn_decay * t / max_turns)
    # base algorithm
    clip_low: Scalar = 0.2
    clip_high: Scalar = 0.2
    dual_clip: Scalar = 3.0
    kl_coef: Scalar = 0.01  # with the adaptive controller, at the first step
    kl_target: Scalar = 0.1  # nats per policy token, for the adaptive controller
    kl_horizon: Scalar = 10_000.0  # episodes over which it acts
    discount: Scalar = 1.0  # per policy token; per turn in GiGPO's step returns
    gae_lambda: Scalar = 1.0
    value_clip: Scalar = 0.5
    value_coef: Scalar = 1.0
    format_penalty: Scalar = 0.1
    gigpo_weight: Scalar = 1.0  # of the step advantage
    importance_cap: Scalar = 2.0  # on pi_learner / pi_sampler, for truncated importance sampling
    # other entropy controls
    shaping_scale: Scalar = 0.4  # EA
    shaping_kappa: Scalar = 2.0
    empg_sharpness: Scalar = 1.0  # EMPG
    empg_bonus: Scalar = 0.1
    cov_fraction: Scalar = 0.0002  # Clip-Cov and KL-Cov: share of tokens that are treated
    cov_low: Scalar = 1.0  # Clip-Cov: band of covariances it draws from
    cov_high: Scalar = 5.0
    cov_coef: Scalar = 1.0  # KL-Cov: weight of its divergence
    peak_quantile: Scalar = 0.8  # SIREN: only tokens above this quantile of their episode's entropy are regularised
    target_entropy: Scalar = 0.2  # nats; adaptive coefficient
    target_delta: Scalar = 1e-4  # per RL step
    target_cap: Scalar = 0.005
    # learning rates at their highest, in place of `OptimConfig.lr` where that is 1, as in every run; else factors of it
    lr: Scalar = 1.0
    critic_lr: Scalar = 1.0


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Choices. Defaults: the v2 paper on GRPO. The names are looked up in `registry`."""

    # advantages
    estimator: str = "grpo"
    gae_scope: Literal["trajectory", "turn"] = "trajectory"  # `turn`: GAE inside each turn, which ends with the return
    whiten: bool = True  # over policy tokens; of `gae`, `reinforce_pp` and `reinforce_pp_baseline`
    format_penalty_place: Literal["after", "before"] = "after"  # the estimator's normalisation
    drop_uniform_groups: bool = False  # DAPO: groups whose returns are all equal are left out
    shaper: str = "none"  # of the advantages, by entropy
    # policy loss
    aggregation: Aggregation = "token-mean"
    ratio_scope: Scope = "token"  # `trajectory` or `turn`: GSPO
    kl: KLKind = "k3"
    kl_place: Literal["loss", "reward"] = "loss"
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    recompute_old_log_prob: bool = False  # before the update, by the learner, in place of what the sampler recorded
    truncated_importance: bool = False  # needs the two, so it recomputes them too
    token_control: str = "none"  # which tokens the surrogate treats differently
    # entropy
    entropy_term: str = "epo"
    nucleus: float = 0.8  # SIREN's entropy is that of the likeliest words that hold this probability
    coefficient: Literal["fixed", "target"] = "fixed"
    penalty: Penalty = "hinge"
    penalty_scope: PenaltyScope = "token"
    history: HistoryMode = "cumulative"
    history_index: Literal["global", "turn"] = "global"
    phase: Phase = "exponential"
    phase_steps: int | None = None  # K of the phase schedule; None = the run's own length
    turn_gate: bool = False  # penalty only from turn max_turns // 2 on
    entropy_aggregation: Aggregation = "trajectory"
    released: bool = False  # advantages, averages and history as the release has them: `released_rows`
    # shapes
    num_trajectories: int = 1  # N
    max_turns: int = 1  # U
    max_tokens: int = 1  # divisor of `seq-mean-token-sum-norm`
    turn_tokens: int = 1  # tokens of a turn at most, for `released`
    mini_turns: int = 1  # turns of a mini-batch of the release, a multiple of `micro_turns`
    micro_turns: int = 1  # turns of a micro-batch of the release, each of which counts alike

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
        """The nucleus whose entropy the loss takes; None: all words."""
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
    count: Int[Array, ""]


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
