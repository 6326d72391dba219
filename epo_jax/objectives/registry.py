"""Everything that has a name: a new estimator, control or method is one function elsewhere and one line here.

A method is written `base` or `base+variant[+variant...]`: `grpo`, `ppo+epo`, `dapo+epo_wo_dw`, `grpo+kl_cov`.
"""

import dataclasses
from collections.abc import Callable

from epo_jax.common.errors import UserError, nearest
from epo_jax.objectives import advantages, controls
from epo_jax.objectives.spec import Hyper, ObjectiveConfig
from epo_jax.settings.table import SETTINGS

# (batch, old, hyper, objective) -> (advantage, returns), both [B, T]
ESTIMATORS = {
    "gae": advantages.gae_estimate,
    "grpo": advantages.by_trajectory(advantages.grpo),
    "dr_grpo": advantages.by_trajectory(advantages.dr_grpo),
    "rloo": advantages.by_trajectory(advantages.rloo),
    "reinforce_pp": advantages.reinforce_pp,
    "reinforce_pp_baseline": advantages.reinforce_pp_baseline,
    "gigpo": advantages.gigpo,
}

# (advantage, batch, old, hyper, objective) -> advantage
SHAPERS = {
    "none": lambda advantage, *_: advantage,
    "ea": controls.entropy_shaped,
    "empg": controls.empg,
}

# (rows, episode_keys, hyper) -> rows
TOKEN_CONTROLS = {
    "none": lambda rows, *_: rows,
    "clip_cov": controls.clip_cov,
    "kl_cov": controls.kl_cov,
}

# (entropy, rows, smoothing, hyper, objective) -> (loss, penalty per token)
ENTROPY_TERMS = {
    "epo": controls.epo_term,
    "siren": controls.siren_term,
}

# (history, batch_entropy, hyper) -> lam
COEFFICIENTS = {
    "fixed": controls.fixed_coefficient,
    "target": controls.target_coefficient,
}

# What each base algorithm and variant sets: fields of Hyper and ObjectiveConfig by name.
BASES: dict[str, dict] = {
    "ppo": {"estimator": "gae"},
    "grpo": {"estimator": "grpo"},
    "gigpo": {"estimator": "gigpo"},
    "rloo": {"estimator": "rloo"},
    "reinforce_pp": {"estimator": "reinforce_pp"},
    "reinforce_pp_baseline": {"estimator": "reinforce_pp_baseline"},
    "dr_grpo": {"estimator": "dr_grpo", "aggregation": "seq-mean-token-sum-norm"},
    "dapo": {"estimator": "grpo", "aggregation": "token-mean", "clip_high": 0.28, "kl": "none",
             "drop_uniform_groups": True},
    "gspo": {"estimator": "grpo", "aggregation": "seq-mean-token-mean", "ratio_scope": "trajectory",
             "clip_low": 3e-4, "clip_high": 4e-4},
}  # fmt: skip


def papers_term(env: str) -> dict:
    """What the paper gives of the entropy term in an environment, except its weight lam."""
    given = [setting for setting in SETTINGS if setting.key.startswith("epo.") and setting.paper and setting.key != "epo.lam"]
    return {setting.traced or setting.static: setting.default_for(env) for setting in given}


# A function where it depends on the environment.
VARIANTS: dict[str, dict | Callable[[str], dict]] = {
    "epo": {},
    "epo_paper": papers_term,
    "epo_two_sided": {"kappa_l": 0.5, "kappa_r": 1.5},  # the paper's appendix
    "epo_initial": {"history": "initial"},
    "epo_turn": {"history_index": "turn"},
    "epo_base": {"alpha": 0.0},
    "epo_indicator": {"penalty": "indicator"},
    "epo_wo_dw": {"phase": "constant"},
    "epo_mean_dw": {"phase": "mean"},
    "epo_decay": {"alpha": 0.0, "turn_decay": 1.0},
    "epo_decay_steps": {"alpha": 0.0, "step_decay": 1.0},
    "ea": {"lam": 0.0, "shaper": "ea"},
    "empg": {"lam": 0.0, "shaper": "empg"},
    "clip_cov": {"lam": 0.0, "token_control": "clip_cov"},
    "kl_cov": {"lam": 0.0, "token_control": "kl_cov", "clip_low": 1.0, "clip_high": 1e9, "dual_clip": 1e9},  # no clip
    "siren": {"entropy_term": "siren", "history": "initial", "entropy_aggregation": "seq-mean-token-mean"},
    "target": {"alpha": 0.0, "coefficient": "target"},
    "released": {
        "step": "epo_jax.parity.step", "cuts_mini_batches": True, "penalty": "indicator", "penalty_scope": "token",
        "history": "cumulative", "history_index": "turn", "phase": "two_stage", "phase_steps": 150, "turn_gate": True,
    },
}  # fmt: skip


def method(
    name: str, objective: ObjectiveConfig | None = None, hyper: Hyper | None = None, env: str = "alfworld"
) -> tuple[ObjectiveConfig, Hyper]:
    """The objective and coefficients of a named method, on top of those given (the paper's by default).

    Raises:
        UserError: an unknown name.
    """
    return override(objective or ObjectiveConfig(), hyper or Hyper(), settings_of(name, env))


def settings_of(name: str, env: str = "alfworld") -> dict:
    """What a named method sets in an environment. A base algorithm alone has no entropy term (lam = 0).

    Raises:
        UserError: an unknown name.
    """
    base, *variants = name.split("+")
    for kind, table, chosen in (("base algorithm", BASES, [base]), ("variant", VARIANTS, variants)):
        for unknown in (c for c in chosen if c not in table):
            near = nearest(unknown, table)
            raise UserError(f"{unknown!r} in {name!r} is no {kind}{near}; choose from {', '.join(sorted(table))}.")
    settings = BASES[base] | ({} if variants else {"lam": 0.0})
    for variant in map(VARIANTS.get, variants):
        settings |= variant(env) if callable(variant) else variant
    return settings


def override(objective: ObjectiveConfig, hyper: Hyper, settings: dict) -> tuple[ObjectiveConfig, Hyper]:
    """Sets fields of either by name."""

    choices = {k: v for k, v in settings.items() if k not in Hyper._fields}
    return dataclasses.replace(objective, **choices), hyper._replace(**{k: v for k, v in settings.items() if k in Hyper._fields})
