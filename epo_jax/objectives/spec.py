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
    step: str = "epo_jax.training.step"  # the module that defines the train step
    cuts_mini_batches: bool = False  # the train step cuts mini-batches out of one packed batch, in place of `pack`
    # shapes
    num_trajectories: int = 1  # N
    max_turns: int = 1  # U
    max_tokens: int = 1  # divisor of `seq-mean-token-sum-norm`
    turn_tokens: int = 1  # tokens of a turn at most
    mini_turns: int = 1  # for `cuts_mini_batches`: turns in a mini-batch, a multiple of `micro_turns`
    micro_turns: int = 1  # ... and in a micro-batch, each of which counts alike

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
    count: Int[Array, ""]


class Smoothing(NamedTuple):
    """What the entropy term depends on besides the mini-batch.

    Attributes:
        center: [I] the center of the corridor in nats; `known` [I] is 1 where there is a history to compute it from.
        beta: phase weight.
        lam: weight of the entropy term at this step.
        batch_entropy: the mini-batch's mean entropy as it was sampled.
    """

    center: Float[Array, " I"]
    known: Float[Array, " I"]
    beta: Float[Array, ""]
    lam: Float[Array, ""]
    batch_entropy: Float[Array, ""]
