"""Masked statistics, row aggregation and end-of-answer masks of the release."""

import numpy as np
import pytest

from epo_jax.parity import released
from tests.parity import actor, golden


def mean(a, axis=None):
    return {"mean": released.masked_mean(a["values"], a["mask"], axis)}


def total(a, axis=None):
    return {"sum": (a["values"] * a["mask"]).sum(axis)}


def variance(a, unbiased):
    return {"var": released.masked_var(a["values"], a["mask"], unbiased)}


def whitened(a, shift_mean=True):
    return {"whitened": released.whiten(a["values"], a["mask"], shift_mean)}


def response_mask(a, eos_token):
    return {"mask": actor.response_mask(a["response_id"], tuple(np.ravel(eos_token).tolist()))}


def aggregated(a, loss_agg_mode):
    return {"loss": actor.aggregate(a["loss_mat"], a["loss_mask"], loss_agg_mode)}


REPRODUCED = {
    "masked_mean": mean,
    "masked_sum": total,
    "masked_var": variance,
    "masked_whiten": whitened,
    "get_response_mask": response_mask,
    "agg_loss": aggregated,
}


@pytest.mark.parametrize("function", REPRODUCED)
def test_golden_masked(function):
    golden.check(function, REPRODUCED[function])
