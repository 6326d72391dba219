"""The train step with adapters over a frozen base, and with each kind of critic."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from epo_jax.models import lora
from epo_jax.models.decoder import Lora
from epo_jax.training.state import init_state
from epo_jax.training.step import make_train_step
from tests import rounding, tiny

LORA = Lora(2, 6.0)


@pytest.fixture(scope="module")
def batch():
    return tiny.batched(tiny.episodes(0), 1)


@pytest.fixture(scope="module")
def adapted():
    """Critic -> (state before, state after, metrics) of one update of "ppo" with adapters."""
    config, hyper = tiny.learner("ppo+epo", kl="k3")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=LORA))
    found = {}
    for critic in ("own", "lora", "trunk"):
        chosen = dataclasses.replace(config, critic=critic)
        params = lora.join(tiny.as_params(), lora.init_adapters(chosen.model, jax.random.key(3)))
        state = init_state(chosen, params)
        before = jax.tree.map(np.asarray, state)
        batch = tiny.batched(tiny.episodes(0), 1)
        found[critic] = before, *make_train_step(chosen)(state, batch, hyper)
    return found


def gradient(opt_state, b1=0.9):
    """The first update's, from the first moment."""
    return jax.tree.map(lambda m: np.asarray(m) / (1.0 - b1), optax.tree_utils.tree_get(opt_state, "mu"))


def test_adapters_get_the_chain_rule_of_the_full_gradient(adapted, batch):
    """At B = 0: dL/dB = alpha / rank * A^T dL/dW, and nothing else moves."""
    before, after, metrics = adapted["own"]
    full, full_metrics = tiny.first_update(*tiny.learner("ppo+epo", kl="k3"), batch)
    # Whitened advantages cancel in the policy's part; the entropy's and the divergence's are smaller than these.
    size = max(full_metrics["advantage_max"], -full_metrics["advantage_min"])
    atol = rounding.bound(batch.policy_mask.sum(), size)
    np.testing.assert_allclose(metrics["loss"], full_metrics["loss"], rtol=0, atol=atol)
    found = gradient(after.opt_state)["layers"]
    moved = 0.0
    for name in LORA.targets:
        a = before.params["layers"][f"{name}_lora_a"]
        want = LORA.alpha / LORA.rank * np.einsum("lir,lio->lro", a, full["layers"][name])
        np.testing.assert_allclose(found[f"{name}_lora_b"], want, rtol=1e-3, atol=1e-6)
        assert not found[f"{name}_lora_a"].any()
        moved = max(moved, np.abs(want).max())
    assert moved > 1e-3
    jax.tree.map(np.testing.assert_array_equal, before.base, after.base)
    assert not before.reference and set(before.params) == {"layers"}


def test_every_critic_starts_from_the_same_values_and_learns(adapted):
    """The three see the same hidden states at first, so their output vectors get the same gradient."""
    want = gradient(adapted["own"][1].critic_opt_state)["value"]
    assert np.abs(want).max() > 1e-3
    for before, after, metrics in adapted.values():
        np.testing.assert_allclose(gradient(after.critic_opt_state)["value"], want, rtol=1e-4, atol=1e-6)
        assert np.abs(after.critic["value"] - before.critic["value"]).max() > 1e-4 and metrics["value_loss"] > 0


def test_what_each_critic_keeps_for_itself(adapted):
    base = jax.tree.structure(tiny.parameters())
    assert jax.tree.structure(adapted["own"][0].critic["decoder"]) == base
    assert jax.tree.structure(adapted["lora"][0].critic["decoder"]) == jax.tree.structure(adapted["lora"][0].params)
    assert not jax.tree.leaves(adapted["trunk"][0].critic["decoder"])
    # The value's gradient stops at the trunk: the policy moves as it does under a critic of its own.
    for other in ("lora", "trunk"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            adapted["own"][1].params, adapted[other][1].params,
        )  # fmt: skip
