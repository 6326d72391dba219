"""The closed form of the softmax bandit: where the corridor lets the entropy come to rest."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.bandit import ARMS, BETA, CENTER, COLLAPSE, EXPLOSION, REWARD, boltzmann_entropy, entropies

START = jnp.linspace(1.0, 0.0, ARMS)


def rest(reward, hyper, penalty):
    return entropies(START, reward, hyper, penalty)[-1]


def test_hinge_holds_a_collapsing_policy_at_the_lower_edge():
    low = COLLAPSE.kappa_l * CENTER
    inside, below = (boltzmann_entropy(REWARD, COLLAPSE.lam * (1 + x)) for x in (0.0, BETA * COLLAPSE.alpha))
    assert inside < low < below  # so the optimum is the edge itself
    np.testing.assert_allclose(rest(REWARD, COLLAPSE, "hinge"), low, atol=0.02)


def test_hinge_brings_an_exploding_policy_back_to_the_upper_edge():
    assert BETA * EXPLOSION.alpha > 1  # else the bonus outweighs the hinge
    np.testing.assert_allclose(rest(jnp.zeros(ARMS), EXPLOSION, "hinge"), EXPLOSION.kappa_r * CENTER, atol=0.02)


def test_indicator_leaves_the_policy_to_the_bonus():
    np.testing.assert_allclose(rest(REWARD, COLLAPSE, "indicator"), boltzmann_entropy(REWARD, COLLAPSE.lam), atol=1e-3)
    np.testing.assert_allclose(rest(jnp.zeros(ARMS), EXPLOSION, "indicator"), np.log(ARMS), atol=1e-3)


@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_a_weak_hinge_rests_at_its_own_boltzmann_policy(alpha):
    """Below the edge at the temperature lam * (1 + beta * alpha): not enough to reach the corridor, but exact."""
    hyper = COLLAPSE._replace(alpha=alpha)
    expected = boltzmann_entropy(REWARD, hyper.lam * (1 + BETA * alpha))
    assert expected < hyper.kappa_l * CENTER
    np.testing.assert_allclose(rest(REWARD, hyper, "hinge"), expected, atol=1e-3)
