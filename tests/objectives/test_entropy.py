import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epo_jax.objectives import entropy

nats = st.floats(0.0, 10.0, width=32)
ratio = st.floats(0.0, 3.0, width=32)
few = settings(max_examples=40, deadline=None, derandomize=True)


def history(values, capacity=8):
    """A history of one series with these step means."""
    out = entropy.init_history(capacity)
    for value in values:
        out = entropy.append(out, jnp.array([value], jnp.float32), jnp.ones(1))
    return out


@jax.jit
def hinge(h, center, low, high):
    return entropy.corridor_penalty(h, center, low, high, "hinge")


@given(nats, st.floats(0.125, 10.0, width=32), ratio, ratio)
@few
def test_hinge_is_the_distance_to_the_corridor(h, center, a, b):
    low, high = min(a, b), max(a, b)
    value, slope = jax.value_and_grad(hinge)(h, center, low, high)
    inside = np.float32(low) * np.float32(center) < h < np.float32(high) * np.float32(center)
    distance = max(low * center - h, 0.0) + max(h - high * center, 0.0)
    np.testing.assert_allclose(value, distance, rtol=1e-4, atol=1e-5)
    if inside:
        assert value == 0.0 and slope == 0.0
    elif distance > 1e-4:
        assert slope == (1.0 if h > high * center else -1.0)


@given(st.floats(0.125, 5.0, width=32), ratio)
@few
def test_hinge_is_continuous_at_the_edges(center, kappa):
    edge = np.float32(kappa) * np.float32(center)
    for side in (-1e-4, 1e-4):
        assert hinge(edge + side, center, kappa, kappa + 1.0) <= 2e-4
        assert hinge(edge + side, center, 0.0, kappa) <= 2e-4


@given(nats, nats, ratio, ratio)
@few
def test_indicator_has_exactly_no_gradient(h, center, a, b):
    def penalty(h):
        return entropy.corridor_penalty(h, jnp.float32(center), min(a, b), max(a, b), "indicator")

    value, slope = jax.value_and_grad(penalty)(jnp.float32(h))
    assert value in (0.0, 1.0) and slope == 0.0


def test_center_is_the_mean_of_what_was_appended():
    values = [1.0, 2.0, 4.0]
    h = history(values)
    assert entropy.center(h).value == pytest.approx([np.mean(values)])
    assert entropy.center(h, "sliding", window=2.0).value == pytest.approx([3.0])
    assert entropy.center(h, "ema", ema_decay=0.5).value == pytest.approx([(1 * 0.25 + 2 * 0.5 + 4) / 1.75])
    assert entropy.center(h, "initial").value == pytest.approx([1.0])


@pytest.mark.parametrize("mode", ["cumulative", "sliding", "ema", "initial"])
def test_no_gradient_flows_into_the_center(mode):
    h = history([1.0, 2.0])
    slope = jax.grad(lambda values: entropy.center(h._replace(values=values), mode).value.sum())(h.values)
    assert (slope == 0.0).all()


@given(st.lists(nats, min_size=1, max_size=6), nats)
@few
def test_a_step_moves_the_center_only_once_it_is_appended(past, now):
    before = history(past)
    np.testing.assert_allclose(entropy.center(before).value, [np.mean(past)], rtol=1e-4, atol=1e-6)
    after = entropy.append(before, jnp.array([now], jnp.float32), jnp.ones(1))
    np.testing.assert_allclose(entropy.center(after).value, [np.mean([*past, now])], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["cumulative", "sliding", "ema", "initial"])
def test_an_empty_history_has_no_center(mode):
    center = entropy.center(entropy.init_history(4), mode)
    assert center.known == 0.0 and jnp.isfinite(center.value).all()


def test_capacity_overflow_keeps_the_first_steps():
    h = history([1.0, 3.0, 100.0], capacity=2)
    assert h.count == 3 and entropy.center(h).value == 2.0


def test_history_by_turn_ignores_steps_without_that_turn():
    """Turn 1 was reached in the second step only: its mean is that step's, not half of it (the release pads with 0)."""
    h = entropy.init_history(4, num_turns=2)
    masks = jnp.array([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0]])
    token_entropy, turn = jnp.array([[0.2, 0.4, 9.0, 9.0]]), jnp.array([[0, 0, 1, 1]])
    for mask in masks:
        h = entropy.append(h, *entropy.step_entropy(token_entropy, mask[None], turn, 2))
    center = entropy.center(h)
    np.testing.assert_allclose(center.value, [(0.3 + 0.2) / 2, 9.0], rtol=1e-6)
    np.testing.assert_array_equal(center.known, [1.0, 1.0])


def test_step_entropy_is_the_mean_over_policy_tokens():
    mean, observed = entropy.step_entropy(
        jnp.array([[1.0, 2.0], [6.0, 7.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]]), jnp.zeros((2, 2), jnp.int32)
    )
    assert mean == 3.0 and observed == 1.0


def test_phase_weights_against_the_formulas():
    k = np.arange(0, 11)
    weights = [entropy.phase_weight("exponential", int(i), 10, 3.0) for i in k]
    np.testing.assert_allclose(weights, 1 + np.exp(-3.0 * k / 5), rtol=1e-6)
    assert weights[0] == 2.0
    assert entropy.phase_weight("constant", 7, 10, 3.0) == 1.0
    ratio = np.exp(-3.0 / 75)  # a geometric series
    np.testing.assert_allclose(entropy.phase_weight("mean", 7, 150, 3.0), 1 + (1 - ratio**150) / (1 - ratio) / 150, rtol=1e-6)
    assert round(float(entropy.phase_weight("mean", 149, 150, 3.0)), 2) == 1.17
    np.testing.assert_allclose(entropy.phase_weight("two_stage", 5, 10), 1 - 0.2 * (1 - np.exp(-2)), rtol=1e-6)
    np.testing.assert_allclose(entropy.phase_weight("two_stage", 6, 10), 0.8 * np.exp(-3 / 5), rtol=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "constant", "mean", "two_stage"])
def test_phase_weight_of_a_run_of_one_step(kind):
    assert jnp.isfinite(entropy.phase_weight(kind, 0, 1, 3.0))
