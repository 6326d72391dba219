import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives import policy
from tests import rounding
from tests.objectives import transcription
from tests.objectives.problems import NUM, ONE_PER_ROW, PACKED, TURNS, pack, trajectories

MODES = ("trajectory", "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
weigh = jax.jit(policy.token_weights, static_argnums=(3, 4, 5, 7))


def average(episodes: list[dict], mode: str, max_tokens: int, decay: float = 0.0) -> float:
    """The average of the entropies that `mode` names, written as loops."""
    kept = [(e["entropy"][e["mask"] > 0], e["turn"][e["mask"] > 0]) for e in episodes]
    return transcription.average(*map(list, zip(*kept, strict=True)), mode, max_tokens, TURNS, decay)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [ONE_PER_ROW, PACKED], ids=["rows", "packed"])
def test_weights_are_the_average_they_name(mode, layout):
    for seed in range(3):
        episodes = trajectories(seed)
        rows = pack(episodes, layout, 60)
        weights = weigh(rows["mask"], rows["trajectory"], rows["turn"], NUM, TURNS, mode, 0.0, 37)
        found = (weights * rows["entropy"]).sum()
        expected = average(episodes, mode, 37)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_turn_decay_prefers_early_turns():
    episodes = trajectories(3)
    rows = pack(episodes, ONE_PER_ROW, 60)
    weights = weigh(rows["mask"], rows["trajectory"], rows["turn"], NUM, TURNS, "trajectory", 2.0, 1)
    expected = average(episodes, "trajectory", 1, decay=2.0)
    np.testing.assert_allclose((weights * rows["entropy"]).sum(), expected, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_policy_tokens_weighs_nothing(mode):
    zero = jnp.zeros((2, 4))
    index = jnp.zeros((2, 4), jnp.int32)
    assert (weigh(zero, index, index, NUM, TURNS, mode, 0.0, 10) == 0).all()


def test_surrogate_by_hand():
    """Ratio 2 with clips (0.2, 0.3) and dual clip 3: gain capped at 1.3; loss kept; ratio 5 with A < 0 capped at 3."""
    ratio = jnp.array([[2.0, 2.0, 5.0, 0.5, 0.5]])
    advantage = jnp.array([[1.0, -1.0, -1.0, 1.0, -1.0]])
    part = policy.ppo_surrogate(jnp.log(ratio), advantage, 0.2, 0.3, 3.0)
    np.testing.assert_allclose(part.loss[0], [-1.3, 2.0, 3.0, -0.5, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(part.clipped[0], [1, 0, 0, 0, 1])
    np.testing.assert_array_equal(part.dual_clipped[0], [0, 0, 1, 0, 0])


@pytest.mark.parametrize("scope", ["turn", "trajectory"])
def test_sequence_ratio_is_the_geometric_mean(scope):
    """GSPO: every token of a turn (trajectory) carries the exponential of its mean log ratio."""
    episodes = trajectories(5)
    rows = pack(episodes, PACKED, 60)
    log_ratio = (rows["log_prob"] - rows["old_log_prob"]) * rows["mask"]
    found = policy.scope_mean(log_ratio, rows["mask"], rows["trajectory"], rows["turn"], NUM, TURNS, scope)
    for i, e in enumerate(episodes):
        for t in set(e["turn"]):
            same = (rows["trajectory"] == i) & (rows["mask"] > 0) & (rows["turn"] == t)
            keep = (e["mask"] > 0) & ((e["turn"] == t) | (scope == "trajectory"))
            expected = (e["log_prob"] - e["old_log_prob"])[keep].mean()
            np.testing.assert_allclose(found[same], expected, rtol=1e-4, atol=1e-5)


def test_the_size_of_a_difference_has_no_slope_at_zero():
    x = jnp.array([-2.0, -1e-3, -1e-6, -0.0, 0.0, 1e-6, 1e-3, 2.0])
    value, slope = jax.vmap(jax.value_and_grad(policy.size))(x)
    np.testing.assert_array_equal(value, jnp.abs(x))
    np.testing.assert_allclose(slope, [-1, -1, -1e-3, 0, 0, 1e-3, 1, 1], rtol=1e-6)
    of_kl = jax.vmap(jax.grad(lambda log_prob: policy.kl_estimate(log_prob, jnp.zeros(()), "abs")))(x)
    np.testing.assert_array_equal(of_kl, slope)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_are_unbiased(kind):
    """The expectation of k1 and k3 under pi is the divergence itself."""
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(x)) for x in ([0.3, -1.0, 0.5], [0.1, 0.2, -0.4]))
    p, difference = jnp.exp(log_p), log_p - log_q
    found = (p * policy.kl_estimate(log_p, log_q, kind)).sum()
    sizes = p * (jnp.abs(difference) + (jnp.exp(-difference) + 1.0 if kind == "k3" else 0.0))
    atol = rounding.bound(3 * sizes.size, sizes.sum())  # of both signs; a k3 is itself a sum of three
    np.testing.assert_allclose(found, (p * difference).sum(), rtol=0, atol=atol)


def test_truncated_importance_is_capped_and_constant():
    old = jnp.log(jnp.array([[0.4, 0.2]]))
    sampled = jnp.log(jnp.array([[0.1, 0.25]]))
    np.testing.assert_allclose(policy.truncated_importance(old, sampled, 2.0), [[2.0, 0.8]], rtol=1e-6)
    assert (jax.grad(lambda x: policy.truncated_importance(x, sampled, 2.0).sum())(old) == 0).all()


def test_with_one_turn_the_triple_mean_is_the_mean_of_token_means():
    mask = jnp.array([[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
    trajectory = jnp.array([[0, 0, 0, 1], [2, 2, 2, 2]])
    turn = jnp.zeros((2, 4), jnp.int32)
    triple = weigh(mask, trajectory, turn, 3, 1, "trajectory", 0.7, 1)
    np.testing.assert_allclose(triple, [[1 / 6, 1 / 6, 0, 1 / 3], [0, 1 / 9, 1 / 9, 1 / 9]], rtol=1e-6)
    np.testing.assert_allclose(triple, weigh(mask, trajectory, turn, 3, 1, "seq-mean-token-mean", 0.0, 1), rtol=1e-6)
