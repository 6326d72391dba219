import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives import controls, entropy, registry
from epo_jax.objectives.batch import Current
from epo_jax.objectives.loss import epo_loss, record, smoothing_terms
from epo_jax.objectives.spec import Hyper, ObjectiveConfig
from tests import rounding
from tests.objectives.problems import (
    NUM,
    ONE_PER_ROW,
    PACKED,
    TURNS,
    advantages,
    episode_keys,
    episodes_of,
    pack,
    trajectories,
    weighed,
)

OBJECTIVE = ObjectiveConfig(num_trajectories=NUM, max_turns=TURNS)


@pytest.fixture(scope="module")
def rows():
    return pack(trajectories(0), PACKED, 60)


@pytest.fixture(scope="module")
def batch(rows):
    return episodes_of(rows, np.zeros(NUM), np.zeros(NUM))


@pytest.fixture(scope="module")
def advantage(rows):
    return jnp.asarray(advantages(0), jnp.float32)[rows["trajectory"]]


def table(rows, advantage, hyper, objective=OBJECTIVE, key=0):
    return weighed(rows, advantage * rows["mask"], hyper, objective, episode_keys(key))


def test_entropy_shaping_never_turns_an_advantage_round(batch, advantage):
    shaped = controls.entropy_shaped(advantage, *batch, Hyper(shaping_scale=0.4, shaping_kappa=2.0), OBJECTIVE)
    expected = advantage + np.minimum(0.4 * batch[1].entropy, np.abs(advantage) / 2)
    np.testing.assert_allclose(shaped, expected, rtol=1e-6)
    assert (shaped * advantage >= 0).all()


def test_empg_against_loops(rows, batch, advantage):
    found = controls.empg(advantage, *batch, Hyper(empg_sharpness=1.5, empg_bonus=0.2), OBJECTIVE)
    episodes = trajectories(0)
    mean = {(i, t): e["old_entropy"][(e["mask"] > 0) & (e["turn"] == t)].mean()
            for i, e in enumerate(episodes) for t in set(e["turn"])}  # fmt: skip
    low, high = min(mean.values()), max(mean.values())
    clear = {k: np.exp(-1.5 * (h - low) / (high - low)) for k, h in mean.items()}
    scale = np.mean(list(clear.values()))
    expected = np.zeros(rows["mask"].shape)
    for i, t in clear:
        here = (rows["trajectory"] == i) & (rows["turn"] == t) & (rows["mask"] > 0)
        expected[here] = advantages(0)[i] * clear[i, t] / scale + 0.2 * clear.get((i, t + 1), 0.0)
    keep = np.asarray(rows["mask"]) > 0
    center = np.mean([expected[(rows["trajectory"] == i) & (rows["turn"] == t) & keep].mean() for i, t in clear])
    np.testing.assert_allclose(np.asarray(found)[keep], expected[keep] - center, rtol=1e-4, atol=1e-5)


def covariances(rows, advantage):
    keep = np.asarray(rows["mask"]) > 0
    log_prob, a = np.asarray(rows["old_log_prob"]), np.asarray(advantage)
    return np.where(keep, (log_prob - log_prob[keep].mean()) * (a - a[keep].mean()), -np.inf), keep


def test_kl_cov_charges_the_tokens_of_largest_covariance(rows, advantage):
    share, keep = covariances(rows, advantage)
    found = controls.kl_cov(table(rows, advantage, Hyper()), None, Hyper(cov_fraction=0.1, cov_coef=2.0))
    count = int(0.1 * keep.sum())
    expected = share >= np.sort(share.ravel())[-count]
    np.testing.assert_allclose(found.weights.divergence, 2.0 * found.weights.policy * expected, rtol=1e-6)
    np.testing.assert_array_equal(found.weights.surrogate, found.weights.policy)


def test_the_divergence_of_kl_cov_takes_the_place_of_every_clip(rows, advantage):
    objective, hyper = registry.method("grpo+kl_cov", OBJECTIVE, Hyper(kl_coef=0.0, cov_fraction=0.1))
    part = table(rows, advantage, hyper, objective)
    smoothing = smoothing_terms(entropy.init_history(4), 0, 4, part, hyper, objective)
    log_ratio = 5.0 * (rows["log_prob"] - rows["old_log_prob"])  # far beyond what PPO keeps
    loss, sums = epo_loss(Current(rows["old_log_prob"] + log_ratio, rows["entropy"]), part, smoothing, hyper, objective)
    share, keep = covariances(rows, advantage)
    charged = share >= np.sort(share.ravel())[-int(0.1 * keep.sum())]
    terms = (-advantage * np.exp(log_ratio) + charged * np.abs(log_ratio))[keep]  # advantages of both signs
    np.testing.assert_allclose(loss, np.mean(terms), rtol=0, atol=rounding.bound(terms.size, np.mean(np.abs(terms))))
    assert sums["clip_fraction"] == sums["dual_clip_fraction"] == 0.0


def test_clip_cov_silences_some_tokens_of_the_band(rows, advantage):
    share, keep = covariances(rows, advantage)
    hyper = Hyper(cov_fraction=0.1, cov_low=0.1, cov_high=1.0)
    silenced = []
    for key in range(2):
        found = controls.clip_cov(table(rows, advantage, hyper), episode_keys(key), hyper)
        off = np.asarray(found.weights.surrogate == 0) & keep
        assert off.sum() == int(0.1 * keep.sum())
        assert ((share > 0.1) & (share < 1.0))[off].all()
        silenced.append(off)
    assert (silenced[0] != silenced[1]).any()


def test_clip_covs_draws_follow_the_token_wherever_it_is_packed():
    keys, found = episode_keys(3), []
    for layout, length in ((ONE_PER_ROW, 24), (PACKED, 60)):
        rows = pack(trajectories(0), layout, length)
        drawn = controls.uniforms(table(rows, jnp.zeros_like(rows["mask"]), Hyper()), keys)
        found.append([np.asarray(drawn)[(rows["trajectory"] == i) & (rows["mask"] > 0)] for i in range(NUM)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    values = np.concatenate(found[0])
    assert len(set(values.tolist())) == values.size and 0.3 < values.mean() < 0.7


def test_clip_cov_with_an_empty_band_silences_nothing(rows, advantage):
    hyper = Hyper(cov_low=1e6, cov_high=2e6)
    found = controls.clip_cov(table(rows, advantage, hyper), episode_keys(), hyper)
    np.testing.assert_array_equal(found.weights.surrogate, found.weights.policy)


def peaks_by_hand(rows, quantile):
    """The top share of each episode's tokens by sampled entropy, at least one."""
    h, peak = np.asarray(rows["old_entropy"]), np.zeros(rows["mask"].shape, bool)
    for i in range(NUM):
        own = np.asarray((rows["trajectory"] == i) & (rows["mask"] > 0))
        peak |= own & (h >= np.sort(h[own])[-max(int((1 - quantile) * own.sum() + 1e-4), 1)])
    return peak


@pytest.mark.parametrize("quantile", [0.0, 0.6, 0.8, 1.0])
def test_peak_tokens_are_the_top_of_each_episode(rows, quantile):
    found = controls.peak_mask(rows["old_entropy"], rows["mask"], rows["trajectory"], NUM, quantile)
    np.testing.assert_array_equal(found, peaks_by_hand(rows, quantile))


def test_siren_pulls_peak_tokens_towards_the_first_step(rows, advantage):
    """lam (mean - anchor)^2 over the mean over episodes of the mean over peak tokens; the first step's same mean is the
    anchor; tokens that are no peak have no gradient."""
    objective, hyper = registry.method("grpo+siren", OBJECTIVE, Hyper(lam=0.5, peak_quantile=0.6))
    first = entropy.append(entropy.init_history(4), jnp.array([0.6]), jnp.ones(1))
    history = entropy.append(first, jnp.array([99.0]), jnp.ones(1))
    part = table(rows, advantage, hyper, objective)
    smoothing = smoothing_terms(history, 2, 4, part, hyper, objective)

    def term(h):
        return controls.siren_term(h, part, smoothing, hyper, objective)[0]

    value, slope = jax.value_and_grad(term)(rows["old_entropy"])
    h, peak = np.asarray(rows["old_entropy"]), peaks_by_hand(rows, 0.6)
    own = [peak & np.asarray(rows["trajectory"] == i) for i in range(NUM)]
    mean = np.mean([h[o].mean() for o in own])
    share = sum(o / (NUM * o.sum()) for o in own)
    np.testing.assert_allclose(value, 0.5 * (mean - 0.6) ** 2, rtol=1e-4)
    np.testing.assert_allclose(slope, 0.5 * 2 * (mean - 0.6) * share, rtol=1e-4, atol=1e-7)
    anchored = record(entropy.init_history(4), part.batch, part.old, hyper, objective)
    np.testing.assert_allclose(anchored.values[0, 0], mean, rtol=1e-5)


def test_adaptive_coefficient_follows_the_history():
    """Target 1: up after 0.5 (never above the cap), down after 2 (never below 0), off while the batch is above."""
    hyper = Hyper(lam=0.01, target_entropy=1.0, target_delta=0.01, target_cap=0.025)
    history, found = entropy.init_history(8), [controls.target_coefficient(entropy.init_history(8), jnp.float32(0.9), hyper)]
    for value in (0.5, 0.5, 2.0, 2.0, 2.0, 0.5):
        history = entropy.append(history, jnp.array([value]), jnp.ones(1))
        found.append(controls.target_coefficient(history, jnp.float32(0.9), hyper))
        assert controls.target_coefficient(history, jnp.float32(1.1), hyper) == 0.0
    np.testing.assert_allclose(found, [0.01, 0.02, 0.025, 0.015, 0.005, 0.0, 0.01], atol=1e-7)
