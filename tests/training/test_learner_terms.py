"""The train step's divergence terms, importance sampling and nucleus, against the same thing written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives.batch import Old
from epo_jax.objectives.loss import ratio_spread
from epo_jax.settings.config import base_config
from epo_jax.training.from_config import objective_and_hyper
from epo_jax.training.step_metrics import advantage_statistics
from tests import rounding, tiny

ALL_EQUAL = tuple(range(tiny.GROUPS))  # every group wins throughout: GRPO's advantages vanish, only the KL is left


@pytest.fixture(scope="module")
def batch():
    return tiny.batched(tiny.episodes(0), 1)


@pytest.fixture(scope="module")
def level():
    """A batch without advantages."""
    return tiny.batched(tiny.episodes(0, uniform=ALL_EQUAL), 1)


def token_mean(x, batch):
    return (x * batch.policy_mask[0]).sum() / batch.policy_mask[0].sum()


def full_kl(params, reference, batch):
    """Mean over policy tokens of sum_v p (log p - log q), from dense logits."""
    log_p, log_q = (tiny.dense_log_p(tree, tiny.inputs(batch)) for tree in (params, reference))
    return token_mean((jnp.exp(log_p) * (log_p - log_q)).sum(-1), batch)


def k3(params, reference, batch):
    log_p, log_q = (
        jnp.take_along_axis(tiny.dense_log_p(tree, tiny.inputs(batch)), jnp.asarray(batch.label[0])[..., None], -1)[..., 0]
        for tree in (params, reference)
    )
    return token_mean(jnp.exp(log_q - log_p) - (log_q - log_p) - 1.0, batch)


@pytest.mark.parametrize("kind, written_out", [("full", full_kl), ("k3", k3)])
def test_the_divergence_in_the_loss_and_its_gradient(level, kind, written_out):
    config, hyper = tiny.learner("grpo", kl=kind, kl_coef=0.7, format_penalty=0.0)
    reference = tiny.as_params(tiny.parameters(1))
    gradient, metrics = tiny.first_update(config, hyper, level, reference=tiny.as_params(tiny.parameters(1)))
    value, expected = jax.value_and_grad(written_out)(tiny.as_params(), reference, level)
    np.testing.assert_allclose(metrics["kl"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 0.7 * value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.7 * b, rtol=1e-4, atol=1e-6), gradient, expected)


def test_the_divergence_in_the_reward_is_paid_by_the_episode(level):
    """Dr.GRPO with equal returns: an episode's advantage is its group's mean cost less its own."""
    config, hyper = tiny.learner("dr_grpo", kl="k1", kl_place="reward", kl_coef=0.7, format_penalty=0.0)
    _, metrics = tiny.first_update(config, hyper, level, reference=tiny.as_params(tiny.parameters(1)))
    own, other = (np.asarray(tiny.own_statistics(level, params)[0]) for params in (None, tiny.parameters(1)))
    k1, here = (own - other) * level.policy_mask[0], level.policy_mask[0] > 0
    cost = np.array([0.7 * k1[here & (level.trajectory[0] == i)].sum() for i in range(tiny.EPISODES)])
    advantage = np.repeat(cost.reshape(tiny.GROUPS, -1).mean(1), tiny.SIZE) - cost
    expected = np.square(advantage[level.trajectory[0]][here]).mean()
    np.testing.assert_allclose(metrics["advantage_rms"], np.sqrt(expected), rtol=1e-4)
    atol = rounding.bound(here.sum(), np.mean(np.abs(own[here]) + np.abs(other[here])))  # k1 has both signs
    np.testing.assert_allclose(metrics["kl"], k1.sum() / here.sum(), rtol=0, atol=atol)
    assert metrics["loss"] == metrics["policy_loss"]


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_the_adaptive_coefficient_follows_the_divergence(place):
    """Ziegler et al.: times 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon after each step."""
    config, hyper = tiny.learner("grpo", kl="k3", kl_place=place, kl_controller="adaptive", kl_coef=0.5, kl_target=0.2,
                                 kl_horizon=30.0)  # fmt: skip
    state, expected, factors = tiny.start(config, reference=tiny.as_params(tiny.parameters(1))), 0.5, []
    for target in (0.2, 1e3, 1e-3):
        batch = tiny.batched(tiny.episodes(len(factors)), 1)
        state, metrics = tiny.program(config)(state, batch, hyper._replace(kl_target=np.float32(target)))
        np.testing.assert_allclose(metrics["kl_coef"], expected, rtol=1e-5)
        factors.append(1.0 + np.clip(metrics["kl"] / target - 1.0, -0.2, 0.2) * tiny.EPISODES / 30.0)
        expected *= factors[-1]
    np.testing.assert_allclose(0.5 * state.kl_scale, expected, rtol=1e-5)
    np.testing.assert_allclose(factors[1:], [1.0 - 0.08, 1.0 + 0.08], rtol=1e-5)


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_the_coefficient_is_the_states_times_the_given_one(batch, place):
    config, hyper = tiny.learner("grpo", kl_place=place)
    found = []
    for coef, scale in ((0.3, 1.0), (0.1, 3.0)):
        given = hyper._replace(kl_coef=np.float32(coef))
        state = {"kl_scale": jnp.float32(scale), "reference": tiny.as_params(tiny.parameters(1))}
        found.append(tiny.first_update(config, given, batch, **state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)


def test_truncated_importance_sampling_corrects_the_sampler():
    """A sampler that thinks its tokens 1.5 times less likely than the learner does: the surrogate weighs 1.5, at most the
    cap; without the correction the ratio itself would be off, and clipped."""
    trajectories = tiny.episodes(0)
    plain = tiny.first_update(*tiny.learner("grpo", kl="none"), tiny.batched(trajectories, 1))[1]
    for t in trajectories:
        t.log_prob = [x - np.log(1.5) if turn >= 0 else 0.0 for x, turn in zip(t.log_prob, t.turn, strict=True)]
    off = tiny.batched(trajectories, 1)
    for cap, factor in ((2.0, 1.5), (1.2, 1.2)):
        config, hyper = tiny.learner("grpo", kl="none", truncated_importance=True, importance_cap=cap)
        corrected = tiny.first_update(config, hyper, off)[1]
        # A mean of advantages that cancel in each group.
        atol = factor * rounding.bound(off.policy_mask.sum(), max(plain["advantage_max"], -plain["advantage_min"]))
        np.testing.assert_allclose(corrected["policy_loss"], factor * plain["policy_loss"], rtol=0, atol=atol)
        np.testing.assert_allclose(corrected["approx_kl"], 0.0, atol=1e-6)
    uncorrected = tiny.first_update(*tiny.learner("grpo", kl="none"), off)[1]
    np.testing.assert_allclose(uncorrected["approx_kl"], -np.log(1.5), rtol=1e-4)


def test_the_ratio_from_its_smallest_to_its_largest():
    """Of every policy token in either mini-batch, whatever the clip does to it; and the divergence that k3 makes of them."""
    trajectories, rng = tiny.episodes(0), np.random.default_rng(0)
    for t in trajectories:
        t.log_prob = [x + rng.normal(0, 0.5) if turn >= 0 else 0.0 for x, turn in zip(t.log_prob, t.turn, strict=True)]
    config, hyper = tiny.learner("grpo", kl="none")
    off = tiny.batched(trajectories, 1)
    _, metrics = tiny.first_update(config, hyper, off)
    here = off.policy_mask[0] > 0
    own, sampler = np.asarray(tiny.own_statistics(off)[0])[here], off.behaviour_log_prob[0][here]
    log_ratio = own - sampler
    np.testing.assert_allclose(metrics["ratio_min"], np.exp(log_ratio.min()), rtol=1e-4)
    np.testing.assert_allclose(metrics["ratio_max"], np.exp(log_ratio.max()), rtol=1e-4)
    assert metrics["ratio_min"] < 1 - 0.2 and metrics["ratio_max"] > 1 + 0.2
    atol = rounding.bound(here.sum(), np.mean(np.abs(own) + np.abs(sampler)))  # of either sign: a mean of -4e-4 is left of 3
    np.testing.assert_allclose(metrics["approx_kl"], -log_ratio.mean(), rtol=0, atol=atol)
    np.testing.assert_allclose(metrics["approx_kl_k3"], (np.exp(log_ratio) - 1 - log_ratio).mean(), rtol=1e-4)
    ratio = np.exp(log_ratio.astype(np.float64))
    np.testing.assert_allclose(metrics["ratio_variance"], ratio.var(), rtol=1e-4)
    np.testing.assert_allclose(metrics["effective_sample_size"], ratio.sum() ** 2 / (ratio.size * (ratio**2).sum()), rtol=1e-4)
    assert metrics["ratio_variance"] > 0.1 and metrics["effective_sample_size"] < 0.9


def test_the_spread_of_the_ratio_is_a_mean_over_mini_batches():
    """The ratios of the first mini-batch are e times those of the second, which leaves each one's effective size as it is."""
    rng, trajectories = np.random.default_rng(1), tiny.episodes(0)
    config, hyper = tiny.learner("grpo", kl="none", lr=0.0)
    two = tiny.batched(trajectories, 2)
    noise = rng.normal(0, 0.3, two.policy_mask.shape) - np.array([1.0, 0.0])[:, None, None]
    two = two._replace(behaviour_log_prob=((two.behaviour_log_prob + noise) * two.policy_mask).astype(np.float32))
    _, metrics = tiny.program(config, 2)(tiny.start(config), two, hyper)
    ratios = [np.exp(-noise[m][two.policy_mask[m] > 0]) for m in range(2)]
    np.testing.assert_allclose(metrics["ratio_variance"], np.mean([r.var() for r in ratios]), rtol=1e-3)
    sizes = [r.mean() ** 2 / (r**2).mean() for r in ratios]
    np.testing.assert_allclose(metrics["effective_sample_size"], np.mean(sizes), rtol=1e-3)


def test_ratios_near_1_keep_their_variance():
    """A billionth, which the mean of squares less the square of the mean would lose in float32."""
    excess = np.array([3e-5, -3e-5, 1e-5, -1e-5])
    log_ratio = np.log1p(excess)
    means = {"approx_kl": -log_ratio, "approx_kl_k3": excess - log_ratio, "ratio_excess_square": np.square(excess)}
    found = ratio_spread({name: jnp.float32(x.mean()) for name, x in means.items()})
    np.testing.assert_allclose(found["ratio_variance"], np.var(1 + excess), rtol=1e-5)
    assert found["effective_sample_size"] == 1.0 and "ratio_excess_square" not in found


def test_advantage_statistics_are_of_the_tokens_trained_on():
    advantage = jnp.array([[1.0, -2.0, 9.0], [4.0, 0.0, 0.0]])
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    old = Old(*4 * [advantage], mask, advantage, advantage)
    found = advantage_statistics(old)
    kept = np.array([1.0, -2.0, 4.0])
    expected = {"mean": kept.mean(), "std": kept.std(), "rms": np.sqrt(np.square(kept).mean()), "min": -2.0, "max": 4.0}
    assert {name.removeprefix("advantage_"): float(x) for name, x in found.items()} == pytest.approx(expected)
    nothing = advantage_statistics(old._replace(mask=jnp.zeros_like(mask)))
    assert nothing["advantage_mean"] == nothing["advantage_std"] == 0.0 and not np.isfinite(nothing["advantage_max"])


def test_every_key_of_a_control_is_read():
    def read(key=None, value=None):
        config = base_config("toy")
        config.algo.name = "grpo+siren"
        if key:
            config.control[key] = value
        return objective_and_hyper(config)

    usual = read()
    unread = [key for key, value in base_config("toy").control.items() if read(key, 0.75 * value) == usual]
    assert not unread
    assert read("nucleus", 0.6)[0].entropy_top_p == 0.6


def test_sirens_entropy_is_that_of_the_nucleus(batch):
    """And its history that of the mean which its term takes: over episodes, of the mean over each one's tokens."""
    config, hyper = tiny.learner("grpo+siren", nucleus=0.6, peak_quantile=0.0)
    state, metrics = tiny.program(config)(tiny.start(config), batch, hyper)
    p = np.sort(np.exp(tiny.dense_log_p(tiny.as_params(), tiny.inputs(batch))), axis=-1)[..., ::-1]
    kept = np.where(np.cumsum(p, -1) - p < 0.6, p, 0.0)
    q = kept / kept.sum(-1, keepdims=True)
    by_token = -(q * np.log(np.where(q > 0, q, 1.0))).sum(-1)
    expected = token_mean(by_token, batch)
    np.testing.assert_allclose(metrics["entropy"], expected, rtol=1e-4)
    own = [(batch.trajectory[0] == i) & (batch.policy_mask[0] > 0) for i in range(tiny.EPISODES)]
    np.testing.assert_allclose(state.history.values[0, 0], np.mean([by_token[o].mean() for o in own]), rtol=1e-4)
    assert metrics["behaviour_entropy"] > 1.1 * expected
