"""Every named arm through the real train step: one program serves all its steps, it moves the policy, and no two arms
are the same, but those that should be."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives import entropy, registry
from tests import tiny

ARMS = (*registry.BASES, "ppo+epo", *(f"grpo+{overlay}" for overlay in registry.VARIANTS))
# Strong enough for each arm's own term to show after three steps on a policy of this size.
STRONG = {"alpha": 2.0, "kappa_l": 0.95, "kappa_r": 1.05, "cov_fraction": 0.2, "cov_low": 0.05, "target_delta": 0.05,
          "target_entropy": 9.0, "target_cap": 1.0}  # fmt: skip


@functools.cache
def batches(mini_batches: int):
    return [tiny.batched(tiny.episodes(seed, uniform=(seed,)), mini_batches) for seed in range(3)]


@functools.cache
def trained(arm: str) -> np.ndarray:
    """The parameters after one step on each batch, as one vector."""
    config, hyper = tiny.learner(arm)
    given = {k: np.float32(v) for k, v in STRONG.items() if k not in overridden(arm)}
    hyper = hyper._replace(**given, lam=np.float32(0.1 * (hyper.lam > 0)))
    history = tiny.start(config).history
    width = history.values.shape[1]  # an earlier step of so low a mean, 1 to 3 nats by turn, that every arm's corridor is left
    state = tiny.start(config, history=entropy.append(history, jnp.linspace(1.0, 3.0, width), jnp.ones(width)))
    mini_batches = 1 if config.objective.cuts_mini_batches else 2
    for batch in batches(mini_batches):
        state, metrics = tiny.program(config, mini_batches)(state, batch, hyper)
        assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert int(state.history.count) == 4
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)])


def overridden(arm: str) -> set[str]:
    return set(registry.settings_of(arm))


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains_with_one_program(arm):
    before = np.concatenate([np.ravel(x) for x in jax.tree.leaves(tiny.parameters())])
    moved = trained(arm) - before
    assert np.isfinite(moved).all() and np.abs(moved).max() > 1e-4


def test_no_two_arms_are_the_same_but_for_the_penalty_without_gradient():
    """An arm whose settings never reach the step would end where another ends."""
    same = [
        (one, other) for one, other in itertools.combinations(ARMS, 2)
        if np.abs(trained(one) - trained(other)).max() < 1e-5
    ]  # fmt: skip
    assert same == [("grpo+epo_base", "grpo+epo_indicator")]
