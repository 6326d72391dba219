import jax.numpy as jnp
import pytest

from epo_jax.common.errors import UserError
from epo_jax.objectives import registry
from epo_jax.objectives.spec import Hyper, ObjectiveConfig

BASES = ("ppo", "grpo", "gigpo", "rloo", "reinforce_pp", "dr_grpo", "dapo")
VARIANTS = (
    "epo", "epo_base", "epo_wo_dw", "epo_indicator", "epo_decay", "ea", "target", "clip_cov", "kl_cov", "siren", "empg",
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


def test_arms_keep_the_settings_they_do_not_name():
    objective, hyper = registry.method("dapo+epo", ObjectiveConfig(max_turns=7, kl="k1"), Hyper(lam=jnp.float32(0.3)))
    assert (objective.max_turns, objective.kl, hyper.lam, hyper.clip_high) == (7, "none", jnp.float32(0.3), 0.28)


@pytest.mark.parametrize("name, culprit", [("grop", "grop"), ("grpo+epoo", "epoo"), ("", "''")])
def test_unknown_arms_are_named(name, culprit):
    with pytest.raises(UserError, match=culprit):
        registry.method(name)
