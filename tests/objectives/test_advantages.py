import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives import advantages
from epo_jax.objectives.loss import estimate
from epo_jax.objectives.registry import ESTIMATORS
from epo_jax.objectives.spec import Hyper, ObjectiveConfig
from epo_jax.parity import released
from tests import rounding
from tests.objectives import transcription
from tests.objectives.problems import NUM, ONE_PER_ROW, PACKED, TURNS, episodes_of, pack, trajectories

RETURNS = np.array([1.0, 0.0, 0.0, 2.0, 2.0, 2.0])
GROUP = np.array([0, 0, 0, 1, 1, 1])
estimate_ = jax.jit(estimate, static_argnums=3)


def objective(**settings):
    return ObjectiveConfig(num_trajectories=NUM, max_turns=TURNS, format_penalty_place="after", **settings)


@pytest.mark.parametrize("layout", [ONE_PER_ROW, PACKED], ids=["rows", "packed"])
def test_gae_runs_over_policy_tokens_across_turns_and_stops_at_episodes(layout):
    episodes = trajectories(0)
    rows = pack(episodes, layout, 60)
    found, returns = jax.jit(advantages.gae)(rows["reward"], rows["value"], rows["mask"], rows["trajectory"] + 1, 0.9, 0.8)
    for i, e in enumerate(episodes):
        here = (rows["trajectory"] == i) & (rows["mask"] > 0)
        value = e["value"][e["mask"] > 0]
        expected = transcription.gae(e["reward"][e["mask"] > 0], value, 0.9, 0.8)
        np.testing.assert_allclose(found[here], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(returns[here], expected + value, rtol=1e-4, atol=1e-5)
    assert (found[rows["mask"] == 0] == 0).all()


def test_gae_within_turns_is_the_release_on_turn_rows():
    """Each turn stands alone with the episode's return on its last token (parity mode)."""
    rows = pack(trajectories(1), PACKED, 60)
    batch = episodes_of(rows, RETURNS, GROUP)
    hyper = Hyper(discount=0.9, gae_lambda=0.8, format_penalty=0.0)
    found = estimate_(*batch, hyper, objective(estimator="gae", gae_scope="turn")).returns
    for i, e in enumerate(trajectories(1)):
        for t in set(e["turn"]):
            keep = (e["mask"] > 0) & (e["turn"] == t)
            here = (rows["trajectory"] == i) & (rows["turn"] == t) & (rows["mask"] > 0)
            rewards = np.zeros(keep.sum())
            rewards[-1] = RETURNS[i]
            value = e["value"][keep]
            expected = transcription.gae(rewards, value, 0.9, 0.8) + value
            np.testing.assert_allclose(found[here], expected, rtol=1e-4, atol=1e-5)


def test_gae_within_turns_charges_each_turn_for_itself():
    """The release's GAE on turn rows, with its format penalty and its KL in the reward of the row they belong to."""
    rows = pack(trajectories(7), PACKED, 60)
    hyper = Hyper(format_penalty=0.1, kl_coef=0.3)  # discount and lambda are 1: padding after a row's end costs nothing
    settings = ObjectiveConfig(num_trajectories=NUM, max_turns=TURNS, estimator="gae", gae_scope="turn",
                               format_penalty_place="before", kl="k1", kl_place="reward")  # fmt: skip
    found = estimate_(*episodes_of(rows, RETURNS, GROUP), hyper, settings)
    turns = [(i, e, (e["mask"] > 0) & (e["turn"] == t), t) for i, e in enumerate(trajectories(7)) for t in set(e["turn"])]
    rewards, values, mask = np.zeros((3, len(turns), 8), np.float32)
    for row, (i, e, keep, _) in enumerate(turns):
        size = keep.sum()
        rewards[row, :size] = -0.3 * (e["old_log_prob"] - e["ref_log_prob"])[keep]
        rewards[row, size - 1] += RETURNS[i] - 0.1 * (1.0 - e["valid"][keep][-1])
        values[row, :size], mask[row, :size] = e["value"][keep], 1.0
    expected = released.gae(*map(jnp.asarray, (rewards, values * mask, mask)), 1.0, 1.0)
    for row, (i, _, keep, t) in enumerate(turns):
        here = (rows["trajectory"] == i) & (rows["turn"] == t) & (rows["mask"] > 0)
        for ours, theirs in zip((found.advantage, found.returns), expected, strict=True):
            np.testing.assert_allclose(ours[here], theirs[row, : keep.sum()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", ["gae", "reinforce_pp", "reinforce_pp_baseline"])
def test_whitening_can_be_left_out(estimator):
    batch, hyper = episodes_of(pack(trajectories(3), PACKED, 60), RETURNS, GROUP), Hyper(format_penalty=0.0)
    plain, whitened = (estimate_(*batch, hyper, objective(estimator=estimator, whiten=on)).advantage for on in (False, True))
    np.testing.assert_allclose(advantages.whiten(plain, batch[0].policy_mask), whitened, rtol=1e-4, atol=1e-5)
    assert np.abs(plain - whitened).max() > 0.1


def test_group_estimators_by_hand():
    returns, group = jnp.array([1.0, 0.0, 2.0, 5.0, 3.0]), jnp.array([0, 0, 0, 2, 1])
    np.testing.assert_allclose(advantages.grpo(returns, group, 3)[:3], [0, -1, 1], atol=1e-5)
    np.testing.assert_allclose(advantages.dr_grpo(returns, group, 3)[:3], [0, -1, 1], atol=1e-6)
    np.testing.assert_allclose(advantages.rloo(returns, group, 3)[:3], [0, -1.5, 1.5], atol=1e-6)
    for name in ("grpo", "dr_grpo", "rloo"):
        np.testing.assert_allclose(getattr(advantages, name)(returns, group, 3)[3:], [5, 3], rtol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1.0 / 3.0, 9.7])
def test_equal_returns_have_no_advantage(value):
    """Not even a rounding error of the mean, which the division by the std would blow up."""
    returns, group = jnp.full(7, value), jnp.zeros(7, jnp.int32)
    for name in ("grpo", "dr_grpo", "rloo"):
        assert (getattr(advantages, name)(returns, group, 1) == 0).all()
    assert (advantages.informative(returns, group, 1) == 0).all()


def test_whitening():
    x, mask = jnp.array([[1.0, 2.0, 99.0, 6.0]]), jnp.array([[1.0, 1.0, 0.0, 1.0]])
    kept = np.array([1.0, 2.0, 6.0])
    expected = (kept - kept.mean()) / kept.std(ddof=1)
    np.testing.assert_allclose(advantages.whiten(x, mask)[0], [*expected[:2], 0.0, expected[2]], rtol=1e-5)


def test_turns_end_at_their_last_policy_token():
    mask = jnp.array([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0]])
    turn = jnp.array([[0, 0, 0, 1, 1, 0]])
    found = advantages.turn_ends(mask, jnp.zeros((1, 6), jnp.int32), turn, (1, 2))
    np.testing.assert_array_equal(found, [[0, 0, 1, 0, 1, 0]])


def test_step_advantages_compare_turns_with_the_same_anchor():
    """Two episodes share their first observation (anchor 0); the rest stands alone, the last turn is absent."""
    returns = jnp.array([[1.0, 2.0], [3.0, 9.0]])
    anchor, present = jnp.array([[0, 1], [0, 1]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
    np.testing.assert_allclose(advantages.step_advantages(returns, anchor, present), [[-1, 0], [1, 0]], atol=1e-6)
    normalised = advantages.step_advantages(returns, anchor, present, normalize=True)
    np.testing.assert_allclose(normalised, [[-(0.5**0.5), 0], [0.5**0.5, 0]], rtol=1e-5)


def test_step_returns_are_discounted_per_turn():
    np.testing.assert_allclose(advantages.step_returns(jnp.array([[1.0, 0.0, 4.0]]), 0.5), [[2.0, 2.0, 4.0]], rtol=1e-6)


def test_gigpo_adds_the_step_advantage():
    rows = pack(trajectories(2), ONE_PER_ROW, 24)
    anchor = np.arange(NUM * TURNS).reshape(NUM, TURNS)
    anchor[:3, 0] = 0
    batch = episodes_of(rows, RETURNS, GROUP, anchor)
    hyper = Hyper(format_penalty=0.0, gigpo_weight=0.5)
    found, plain = (estimate_(*batch, hyper, objective(estimator=name)).advantage for name in ("gigpo", "dr_grpo"))
    first = np.array([e["reward"].sum() for e in trajectories(2)])[:3]
    step = 0.5 * (first - first.mean())
    for i in range(NUM):
        here = (rows["trajectory"] == i) & (rows["mask"] > 0)
        for t in range(TURNS):
            at = here & (rows["turn"] == t)
            expected = step[i] if i < 3 and t == 0 else 0.0
            np.testing.assert_allclose((found - plain)[at], expected, atol=1e-5)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_every_estimator_ignores_how_episodes_are_packed(estimator):
    episodes, found = trajectories(4), []
    for layout in (ONE_PER_ROW, PACKED):
        rows = pack(episodes, layout, 60)
        result = estimate_(*episodes_of(rows, RETURNS, GROUP), Hyper(), objective(estimator=estimator))
        for field in (result.advantage, result.returns):
            assert jnp.isfinite(field).all() and (field[rows["mask"] == 0] == 0).all()
        order = [(rows["trajectory"] == i) & (rows["mask"] > 0) for i in range(NUM)]
        found.append(np.concatenate([result.advantage[here] for here in order]))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_every_estimator_under_vmap_over_coefficients_is_a_loop(estimator):
    batch = episodes_of(pack(trajectories(5), PACKED, 60), RETURNS, GROUP)
    settings = objective(estimator=estimator, kl="k1", kl_place="reward", shaper="ea")
    base = Hyper(discount=0.9, gae_lambda=0.8)
    members = [Hyper(*(jnp.float32(x * scale) for x in base)) for scale in (0.5, 0.8, 1.1)]
    mapped = jax.vmap(lambda hyper: estimate_(*batch, hyper, settings))(jax.tree.map(lambda *x: jnp.stack(x), *members))
    for m, hyper in enumerate(members):
        alone, atol = estimate_(*batch, hyper, settings), 1e-5
        if estimator == "grpo":
            # The returns 2, 2, 2 of a group differ only by their divergences, by which GRPO divides what rounding leaves.
            returns = [alone.returns[(batch[0].trajectory == i) & (batch[0].policy_mask > 0)][0] for i in range(3, 6)]
            atol = rounding.bound(3, max(returns)) / np.std(returns, ddof=1)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[m], b, rtol=1e-4, atol=atol), mapped, alone)  # noqa: B023
    assert np.abs(mapped.advantage[0] - mapped.advantage[2]).max() > 1e-3


def test_format_penalty_after_normalisation_costs_what_it_says():
    rows = pack(trajectories(7), ONE_PER_ROW, 24)
    batch = episodes_of(rows, RETURNS, GROUP)
    with_, without = (estimate_(*batch, Hyper(format_penalty=p), objective()).advantage for p in (0.1, 0.0))
    np.testing.assert_allclose(without - with_, 0.1 * (1 - rows["valid"]) * rows["mask"], atol=1e-6)


def test_format_penalty_before_normalisation_lowers_the_return():
    rows = pack(trajectories(7), ONE_PER_ROW, 24)
    before = ObjectiveConfig(num_trajectories=NUM, max_turns=TURNS, format_penalty_place="before")
    found = estimate_(*episodes_of(rows, RETURNS, GROUP), Hyper(format_penalty=0.1), before).advantage
    invalid = [len(set(e["turn"][(e["mask"] > 0) & (e["valid"] == 0)])) for e in trajectories(7)]
    expected = advantages.grpo(jnp.asarray(RETURNS - 0.1 * np.array(invalid), jnp.float32), jnp.asarray(GROUP), 2)
    np.testing.assert_allclose(found, expected[rows["trajectory"]] * rows["mask"], rtol=1e-4, atol=1e-5)


def test_kl_in_the_reward_lowers_the_return_by_its_sum():
    rows = pack(trajectories(8), PACKED, 60)
    batch = episodes_of(rows, RETURNS, GROUP)
    settings = objective(estimator="dr_grpo", kl="k1", kl_place="reward")
    found = estimate_(*batch, Hyper(kl_coef=0.5, format_penalty=0.0), settings).returns
    for i, e in enumerate(trajectories(8)):
        cost = 0.5 * ((e["old_log_prob"] - e["ref_log_prob"]) * e["mask"]).sum()
        here = (rows["trajectory"] == i) & (rows["mask"] > 0)
        np.testing.assert_allclose(found[here], RETURNS[i] - cost, rtol=1e-4, atol=1e-5)


def test_uniform_groups_are_dropped():
    """Group 1's returns are all 2: DAPO trains on group 0 alone, even where a divergence in the reward sets them apart."""
    rows = pack(trajectories(9), PACKED, 60)
    for settings in ({}, {"kl": "k1", "kl_place": "reward"}):
        chosen = objective(drop_uniform_groups=True, **settings)
        result = estimate_(*episodes_of(rows, RETURNS, GROUP), Hyper(), chosen)
        np.testing.assert_array_equal(result.mask, rows["mask"] * (rows["trajectory"] < 3))
