"""Where the release raises: ours refuses what the shapes or the settings show, and gives NaN for what only values show,
which compiled code cannot raise on. Never a number that one could train on."""

import re

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from tests.parity import actor, golden, test_golden_actor, test_golden_advantages, test_golden_losses, test_golden_masked


def refused(reproduce):
    def answer(case):
        with pytest.raises((ValueError, jaxtyping.TypeCheckError)):  # the latter where annotations are checked, as here
            reproduce(golden.inputs(case), **case["kwargs"])

    return answer


def whitening(case):
    assert jnp.isnan(test_golden_masked.whitened(golden.inputs(case))["whitened"]).all()


def group_of_one(case):
    """The named group's tokens are NaN, on the mask and off it."""
    group = re.search(r"for group (\w+)", case["raises"][1]).group(1)
    advantage = test_golden_advantages.outcome("pass@k")(golden.inputs(case), **case["kwargs"])["advantages"]
    assert np.isnan(np.asarray(advantage)[golden.arrays(case, "in")["index"] == group]).all()


def beyond_the_history(case):
    a = golden.inputs(case)
    reproduce = actor.outside_corridor
    outside = reproduce(a["entropy"], a["entropy_history"], a["rollout_step"], actor.PenaltyConfig())
    np.testing.assert_array_equal(jnp.isnan(outside).all(1), a["rollout_step"] >= a["entropy_history"].size)


ANSWERS = {
    "agg_loss": refused(test_golden_masked.aggregated),
    "kl_penalty": refused(test_golden_losses.kl),
    "DataParallelPPOActor.update_policy": refused(test_golden_actor.actor_update),
    "masked_whiten": whitening,
    "compute_grpo_passk_outcome_advantage": group_of_one,
    "generate_entropy_penalty": beyond_the_history,
}


@pytest.mark.parametrize("function", ANSWERS)
def test_golden_raising(function):
    for case in golden.cases(function, raising=True):
        ANSWERS[function](case)
