"""Advantage estimators of the release, on turn rows."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives import advantages
from epo_jax.parity import released
from tests.parity import actor, golden


def both(advantage, returns=None):
    return {"advantages": advantage, "returns": advantage if returns is None else returns}


def rows(a):
    return a["token_level_rewards"], a["response_mask"]


def gae(a, gamma, lam):
    rewards, mask = rows(a)
    return both(*released.gae(rewards, a["values"], mask, gamma, lam))


def reinforce_pp(a, gamma):
    return both(*released.reinforce_pp(*rows(a), gamma))


def remax(a):
    rewards, mask = rows(a)
    return both(*actor.remax(rewards, a["reward_baselines"], mask))


def outcome(name):
    estimate = actor.pass_at_k if name == "pass@k" else functools.partial(released.outcome_advantage, name)

    def advantage(a, compute_mean_std_cross_all_data, norm_adv_by_std_in_grpo=True):
        flags = compute_mean_std_cross_all_data, norm_adv_by_std_in_grpo
        return both(estimate(*rows(a), a["index"], a["traj_index"], *flags))

    return advantage


def gigpo(a, step_advantage_w, mode):
    size = a["index"].size
    anchor = jnp.unique(a["anchor_obs"] + size * a["index"], return_inverse=True, size=size)[1]
    return both(
        released.gigpo(
            a["token_level_rewards"], a["step_rewards"], a["response_mask"], anchor, a["index"], a["traj_index"],
            step_advantage_w, mode == "mean_std_norm",
        )
    )  # fmt: skip


def step_returns(a, gamma):
    """The release's rows, regrouped as one row of turns per trajectory."""
    of_row = np.asarray(a["traj_uid"])
    turn = np.array([(of_row[:i] == of_row[i]).sum() for i in range(of_row.size)])
    rewards = jnp.zeros((of_row.max() + 1, turn.max() + 1)).at[of_row, turn].set(a["rewards"])
    return {"returns": advantages.step_returns(rewards, gamma)[of_row, turn]}


REPRODUCED = {
    "compute_gae_advantage_return": gae,
    "compute_reinforce_plus_plus_outcome_advantage": reinforce_pp,
    "compute_remax_outcome_advantage": remax,
    "compute_grpo_outcome_advantage": outcome("grpo"),
    "compute_grpo_passk_outcome_advantage": outcome("pass@k"),
    "compute_rloo_outcome_advantage": outcome("rloo"),
    "compute_reinforce_plus_plus_baseline_outcome_advantage": outcome("reinforce_pp_baseline"),
    "compute_gigpo_outcome_advantage": gigpo,
    "compute_step_discounted_returns": step_returns,
}
EAGER = ("compute_step_discounted_returns",)


@pytest.mark.parametrize("function", REPRODUCED)
def test_golden_advantages(function):
    golden.check(function, REPRODUCED[function], compiled=function not in EAGER)
