"""The faults of the authors' release that losses and advantages could have: each test fails on the faulty behaviour.

docs/method.md has the list of all twelve; the others have their tests with environments, rollout and evaluation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives import entropy, registry
from epo_jax.objectives.batch import Current
from epo_jax.objectives.loss import epo_loss, estimate, record, smoothing_terms
from epo_jax.objectives.spec import Hyper, ObjectiveConfig
from epo_jax.parity import released
from tests.objectives.problems import NUM, ONE_PER_ROW, PACKED, TURNS, episodes_of, pack, trajectories, weighed
from tests.parity import actor

SHAPES = ObjectiveConfig(num_trajectories=NUM, max_turns=TURNS, max_tokens=40)


def table(rows, hyper, objective):
    return weighed(rows, jnp.zeros_like(rows["mask"]), hyper, objective)


@pytest.mark.parametrize("base", sorted(registry.BASES))
def test_1_and_2_the_corridor_has_a_gradient_in_every_arm(base):
    """The release's penalty is constant in the parameters, and its PPO script does not even pass the flags."""
    objective, hyper = registry.method(f"{base}+epo", SHAPES)
    rows = pack(trajectories(0), ONE_PER_ROW, 24)
    history = entropy.append(entropy.init_history(4), jnp.array([0.1]), jnp.ones(1))  # everything is far above

    def loss(token_entropy, alpha):
        changed = hyper._replace(alpha=alpha)
        part = table(rows, changed, objective)
        smoothing = smoothing_terms(history, 1, 4, part, changed, objective)
        return epo_loss(Current(rows["log_prob"], token_entropy), part, smoothing, changed, objective)[0]

    with_, without = (jax.grad(loss)(rows["entropy"], alpha) for alpha in (hyper.alpha, 0.0))
    above = (rows["mask"] > 0) & (rows["entropy"] > 0.1 * hyper.kappa_r)
    assert (with_[above] > without[above]).all()


def test_4a_the_corridor_never_sees_the_current_step():
    """At step k the centre is the mean of steps 0 to k-1, whatever step k's own entropies are."""
    rows = pack(trajectories(0), ONE_PER_ROW, 24)
    history, means = entropy.init_history(5), []
    for k in range(4):
        sampled = rows["old_entropy"] * (k + 1.0)
        part = table({**rows, "old_entropy": sampled}, Hyper(), SHAPES)
        smoothing = smoothing_terms(history, k, 5, part, Hyper(), SHAPES)
        assert smoothing.known[0] == (k > 0)
        if k:
            np.testing.assert_allclose(smoothing.center, [np.mean(means)], rtol=1e-5)
        history = record(history, part.batch, part.old, Hyper(), SHAPES)
        means.append((sampled * rows["mask"]).sum() / rows["mask"].sum())


def test_4b_short_episodes_do_not_dilute_later_turns():
    """Only the second episode reaches turn 1: its history is that episode's entropy, with no zeros averaged in."""
    token_entropy, mask = jnp.array([[1.0, 0.0], [1.0, 3.0]]), jnp.array([[1.0, 0.0], [1.0, 1.0]])
    mean, observed = entropy.step_entropy(token_entropy, mask, jnp.array([[0, 1], [0, 1]]), 3)
    np.testing.assert_array_equal(mean, [1.0, 3.0, 0.0])
    np.testing.assert_array_equal(observed, [1.0, 1.0, 0.0])


def test_4c_the_history_survives_a_restart():
    """It is a pytree of arrays: what comes back from disk has the same centre and goes on at the same place."""
    history = entropy.init_history(4)
    for value in (0.5, 1.5):
        history = entropy.append(history, jnp.array([value]), jnp.ones(1))
    leaves, structure = jax.tree.flatten(history)
    restored = jax.tree.unflatten(structure, [jnp.asarray(np.array(x)) for x in leaves])
    after = entropy.append(restored, jnp.array([4.0]), jnp.ones(1))
    np.testing.assert_allclose(entropy.center(after).value, [2.0])


def test_7_rows_are_padded_not_duplicated():
    """An empty row changes no advantage; a copy of an episode, the release's filler, would."""
    episodes, returns, group = trajectories(1), np.arange(NUM), np.zeros(NUM)
    plain, padded = (
        estimate(*episodes_of(pack(episodes, layout, 24), returns, group), Hyper(), SHAPES).advantage
        for layout in (ONE_PER_ROW, [*ONE_PER_ROW, [], []])
    )
    np.testing.assert_array_equal(plain, padded[:NUM])


def test_8a_a_long_failure_counts_once():
    """One success in one turn, one failure in nine: the group's mean is a half, not a tenth."""
    scores = jnp.array([1.0] + [0.0] * 9)
    episode = jnp.array([0] + [1] * 9)
    release = released.outcome_advantage(
        "grpo", scores[:, None], jnp.ones((10, 1)), jnp.zeros(10, jnp.int32), episode, normalize=False
    )
    np.testing.assert_allclose(release[:2, 0], [0.9, -0.1], rtol=1e-5)
    ours = registry.advantages.dr_grpo(jnp.array([1.0, 0.0]), jnp.zeros(2, jnp.int32), 1)
    np.testing.assert_allclose(ours, [0.5, -0.5], rtol=1e-6)


def test_8b_a_badly_formatted_turn_costs_its_own_episode_alone():
    """By default the penalty follows the normalisation, so no other episode's advantage moves."""
    rows = pack(trajectories(7), ONE_PER_ROW, 24)
    returns, group = np.arange(NUM) % 3, np.zeros(NUM)
    own, others = (rows["trajectory"] == 2) & (rows["mask"] > 0), rows["trajectory"] != 2
    clean, bad = (
        estimate(*episodes_of({**rows, "valid": valid}, returns, group), Hyper(), SHAPES).advantage
        for valid in (jnp.ones_like(rows["valid"]), jnp.where(others, 1.0, 0.0))
    )
    np.testing.assert_array_equal(clean[others], bad[others])
    assert (bad[own] < clean[own]).all()


def test_9_micro_batches_of_different_length_are_not_averaged_alike():
    """The release's mean of means depends on the split; our weights do not."""
    rows = pack(trajectories(2), PACKED, 60)
    x, mask = rows["entropy"], rows["mask"]
    means = [actor.aggregate(x[s], mask[s], "token-mean") for s in (slice(0, 2), slice(2, 6))]
    whole = actor.aggregate(x, mask, "token-mean")
    assert abs(np.mean(means) - whole) > 1e-3
    weight = table(rows, Hyper(), SHAPES).weights.mean
    np.testing.assert_allclose((weight[:2] * x[:2]).sum() + (weight[2:] * x[2:]).sum(), whole, rtol=1e-5)
