"""Advantage estimators of the release, on turn rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives import advantages, released
from tests.objectives import golden


def both(advantage, returns=None):
    return {"advantages": advantage, "returns": advantage if returns is None else returns}


def rows(a):
    return a["token_level_rewards"], a["response_mask"]


def test_gae():
    def gae(a, gamma, lam):
        rewards, mask = rows(a)
        return both(*released.gae(rewards, a["values"], mask, gamma, lam))

    golden.check("compute_gae_advantage_return", gae)


def test_reinforce_pp():
    golden.check(
        "compute_reinforce_plus_plus_outcome_advantage", lambda a, gamma: both(*released.reinforce_pp(*rows(a), gamma))
    )


def test_remax():
    def remax(a):
        rewards, mask = rows(a)
        return both(*released.remax(rewards, a["reward_baselines"], mask))

    golden.check("compute_remax_outcome_advantage", remax)


@pytest.mark.parametrize(
    "function, name",
    [
        ("compute_grpo_outcome_advantage", "grpo"),
        ("compute_grpo_passk_outcome_advantage", "pass@k"),
        ("compute_rloo_outcome_advantage", "rloo"),
        ("compute_reinforce_plus_plus_baseline_outcome_advantage", "reinforce_pp_baseline"),
    ],
)
def test_outcome(function, name):
    def outcome(a, compute_mean_std_cross_all_data, norm_adv_by_std_in_grpo=True):
        return both(
            released.outcome_advantage(
                name, *rows(a), a["index"], a["traj_index"], compute_mean_std_cross_all_data, norm_adv_by_std_in_grpo
            )
        )

    golden.check(function, outcome)


def test_gigpo():
    def gigpo(a, step_advantage_w, mode):
        size = a["index"].size
        anchor = jnp.unique(a["anchor_obs"] + size * a["index"], return_inverse=True, size=size)[1]
        return both(
            released.gigpo(
                a["token_level_rewards"], a["step_rewards"], a["response_mask"], anchor, a["index"], a["traj_index"],
                step_advantage_w, mode == "mean_std_norm",
            )
        )  # fmt: skip

    golden.check("compute_gigpo_outcome_advantage", gigpo)


def test_step_returns():
    """The release's rows, regrouped as one row of turns per trajectory."""
    for case in golden.cases("compute_step_discounted_returns"):
        a = golden.arrays(case, "in")
        names, of_row = np.unique(a["traj_uid"], return_inverse=True)
        turn = np.array([(of_row[:i] == of_row[i]).sum() for i in range(of_row.size)])
        rewards = np.zeros((names.size, turn.max() + 1), np.float32)
        rewards[of_row, turn] = a["rewards"]
        found = advantages.step_returns(jnp.asarray(rewards), case["kwargs"]["gamma"])[of_row, turn]
        np.testing.assert_allclose(found, golden.arrays(case, "out")["returns"], rtol=1e-5, atol=1e-6)
