import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives import controls, entropy
from epo_jax.objectives.loss import Hyper, ObjectiveConfig, loss_rows, smoothing_terms
from tests.objectives.problems import NUM, PACKED, TURNS, advantages, episodes_of, pack, trajectories

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
    return loss_rows(
        rows["mask"], rows["trajectory"], rows["turn"], rows["old_log_prob"], rows["ref_log_prob"],
        advantage * rows["mask"], hyper, objective,
        behaviour_entropy=rows["old_entropy"], key=jax.random.key(key),
    )  # fmt: skip


def test_entropy_shaping_never_turns_an_advantage_round(batch, advantage):
    shaped = controls.entropy_shaped(advantage, batch, Hyper(shaping_scale=0.4, shaping_kappa=2.0), OBJECTIVE)
    expected = advantage + np.minimum(0.4 * batch.entropy, np.abs(advantage) / 2)
    np.testing.assert_allclose(shaped, expected, rtol=1e-6)
    assert (shaped * advantage >= 0).all()


def test_empg_against_loops(rows, batch, advantage):
    found = controls.empg(advantage, batch, Hyper(empg_sharpness=1.5, empg_bonus=0.2), OBJECTIVE)
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
    np.testing.assert_allclose(np.asarray(found)[keep], expected[keep] - expected[keep].mean(), rtol=1e-4, atol=1e-5)


def covariances(rows, advantage):
    keep = np.asarray(rows["mask"]) > 0
    log_prob, a = np.asarray(rows["old_log_prob"]), np.asarray(advantage)
    return np.where(keep, (log_prob - log_prob[keep].mean()) * (a - a[keep].mean()), -np.inf), keep


def test_kl_cov_charges_the_tokens_of_largest_covariance(rows, advantage):
    share, keep = covariances(rows, advantage)
    found = controls.kl_cov(table(rows, advantage, Hyper()), jax.random.key(0), Hyper(cov_fraction=0.1, cov_coef=2.0))
    count = int(0.1 * keep.sum())
    expected = share >= np.sort(share.ravel())[-count]
    np.testing.assert_allclose(found.divergence_weight, 2.0 * found.weight * expected, rtol=1e-6)
    np.testing.assert_array_equal(found.surrogate_weight, found.weight)


def test_clip_cov_silences_some_tokens_of_the_band(rows, advantage):
    share, keep = covariances(rows, advantage)
    hyper = Hyper(cov_fraction=0.1, cov_low=0.1, cov_high=1.0)
    silenced = []
    for key in range(2):
        found = controls.clip_cov(table(rows, advantage, hyper), jax.random.key(key), hyper)
        off = np.asarray(found.surrogate_weight == 0) & keep
        assert off.sum() == int(0.1 * keep.sum())
        assert ((share > 0.1) & (share < 1.0))[off].all()
        silenced.append(off)
    assert (silenced[0] != silenced[1]).any()


def test_clip_cov_with_an_empty_band_silences_nothing(rows, advantage):
    hyper = Hyper(cov_low=1e6, cov_high=2e6)
    found = controls.clip_cov(table(rows, advantage, hyper), jax.random.key(0), hyper)
    np.testing.assert_array_equal(found.surrogate_weight, found.weight)


def test_siren_pulls_peak_tokens_towards_the_first_step(rows, advantage):
    """Gradient 2 lam (mean - anchor) / count on the top fifth of the tokens by entropy, nothing elsewhere."""
    objective = ObjectiveConfig(
        num_trajectories=NUM, max_turns=TURNS, entropy_term="siren", history="initial", entropy_aggregation="token-mean"
    )
    hyper = Hyper(lam=0.5, peak_quantile=0.8)
    history = entropy.append(entropy.init_history(4), jnp.array([0.6]), jnp.ones(1))
    history = entropy.append(history, jnp.array([99.0]), jnp.ones(1))
    part = table(rows, advantage, hyper, objective)
    smoothing = smoothing_terms(history, 2, 4, rows["old_entropy"], part, hyper, objective)

    def term(h):
        return controls.siren_term(h, part, smoothing, hyper, objective)[0]

    value, slope = jax.value_and_grad(term)(rows["old_entropy"])
    h, keep = np.asarray(rows["old_entropy"]), np.asarray(rows["mask"]) > 0
    peak = keep & (h >= np.sort(h[keep])[-int(0.2 * keep.sum() + 1e-4)])
    gap = h[peak].mean() - 0.6
    np.testing.assert_allclose(value, 0.5 * gap**2, rtol=1e-4)
    np.testing.assert_allclose(slope, np.where(peak, 0.5 * 2 * gap / peak.sum(), 0.0), rtol=1e-4, atol=1e-7)


def test_adaptive_coefficient_follows_the_history():
    """Target 1: up after 0.5, down twice after 2 (never below 0), off while the last entropy is above the target."""
    hyper = Hyper(lam=0.01, target_entropy=1.0, target_delta=0.01)
    history, found = entropy.init_history(4), []
    for value in (None, 0.5, 2.0, 2.0, 0.5):
        if value is not None:
            history = entropy.append(history, jnp.array([value]), jnp.ones(1))
        found.append(controls.target_coefficient(history, hyper))
    np.testing.assert_allclose(found, [0.01, 0.02, 0.0, 0.0, 0.01], atol=1e-7)
