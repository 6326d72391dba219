import dataclasses

import jax.numpy as jnp
import pytest

from epo_jax.common.errors import UserError
from epo_jax.objectives import registry
from epo_jax.objectives.spec import Hyper, ObjectiveConfig

BASES = ("ppo", "grpo", "gigpo", "rloo", "reinforce_pp", "dr_grpo", "dapo")
VARIANTS = (
    "epo", "epo_paper", "epo_two_sided", "epo_initial", "epo_turn", "epo_mean_dw", "epo_decay_steps",
    "epo_base", "epo_wo_dw", "epo_indicator", "epo_decay", "ea", "target", "clip_cov", "kl_cov", "siren", "empg",
    "released",
)  # fmt: skip


@pytest.mark.parametrize("base", BASES)
def test_every_base_takes_every_variant(base):
    for variant in VARIANTS:
        objective, _ = registry.method(f"{base}+{variant}")
        assert objective.estimator in registry.ESTIMATORS
        assert objective.shaper in registry.SHAPERS
        assert objective.token_control in registry.TOKEN_CONTROLS
        assert objective.entropy_term in registry.ENTROPY_TERMS
        assert objective.coefficient in registry.COEFFICIENTS


def test_a_base_alone_has_no_entropy_term():
    assert registry.method("grpo")[1].lam == 0.0
    assert registry.method("grpo+epo")[1].lam == Hyper().lam > 0


def test_variants_are_the_papers_arms():
    assert registry.method("ppo+epo_base")[1].alpha == 0.0
    assert registry.method("ppo+epo_wo_dw")[0].phase == "constant"
    assert registry.method("ppo+epo_decay")[1].turn_decay > 0.0
    assert registry.method("ppo+ea")[0].shaper == "ea" and registry.method("ppo+ea")[1].lam == 0.0


@pytest.mark.parametrize(("env", "alpha"), [("alfworld", 0.1), ("scienceworld", 0.05)])
def test_the_papers_term_whatever_the_config_but_at_its_weight(env, alpha):
    other = ObjectiveConfig(
        penalty="indicator", penalty_scope="trajectory", history="ema", history_index="turn", phase="constant", turn_gate=True,
        entropy_aggregation="token-mean", kl="k1",
    )  # fmt: skip
    strong = Hyper(lam=0.02, alpha=5.0, kappa_l=0.7, kappa_r=1.2, gamma=1.0, turn_decay=2.0, step_decay=2.0, start_step=4)
    objective, hyper = registry.method("grpo+epo_paper", other, strong, env)
    assert hyper == strong._replace(alpha=alpha, kappa_l=0.0, kappa_r=2.0, gamma=3.0, turn_decay=0.0, step_decay=0.0)
    assert objective == ObjectiveConfig(
        penalty="hinge", penalty_scope="token", history="cumulative", history_index="global", phase="exponential",
        turn_gate=False, entropy_aggregation="trajectory", kl="k1",
    )  # fmt: skip


def test_a_variant_of_epo_changes_one_thing():
    given = ObjectiveConfig(penalty_scope="trajectory"), Hyper(alpha=5.0, lam=0.02)
    changes = {
        "epo_two_sided": {"kappa_l": 0.5, "kappa_r": 1.5}, "epo_initial": {"history": "initial"},
        "epo_turn": {"history_index": "turn"}, "epo_mean_dw": {"phase": "mean"},
        "epo_decay_steps": {"alpha": 0.0, "step_decay": 1.0},
    }  # fmt: skip
    for variant, settings in changes.items():
        objective, hyper = registry.method(f"grpo+{variant}", *given)
        found = dataclasses.asdict(objective) | hyper._asdict()
        before = dataclasses.asdict(registry.method("grpo+epo", *given)[0]) | given[1]._asdict()
        assert {key: value for key, value in found.items() if value != before[key]} == settings


def test_arms_keep_the_settings_they_do_not_name():
    objective, hyper = registry.method("dapo+epo", ObjectiveConfig(max_turns=7, kl="k1"), Hyper(lam=jnp.float32(0.3)))
    assert (objective.max_turns, objective.kl, hyper.lam, hyper.clip_high) == (7, "none", jnp.float32(0.3), 0.28)


@pytest.mark.parametrize("name, culprit", [("grop", "grop"), ("grpo+epoo", "epoo"), ("", "''")])
def test_unknown_arms_are_named(name, culprit):
    with pytest.raises(UserError, match=culprit):
        registry.method(name)
