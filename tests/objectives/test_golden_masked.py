"""Masked statistics, row aggregation and end-of-answer masks of the release."""

import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives import released
from tests.objectives import golden


def test_masked_mean():
    golden.check("masked_mean", lambda a, axis=None: {"mean": released.masked_mean(a["values"], a["mask"], axis)})


def test_masked_sum():
    golden.check("masked_sum", lambda a, axis=None: {"sum": (a["values"] * a["mask"]).sum(axis)})


def test_masked_var():
    golden.check("masked_var", lambda a, unbiased: {"var": released.masked_var(a["values"], a["mask"], unbiased)})


def test_masked_whiten():
    def whiten(a, shift_mean=True):
        return {"whitened": released.whiten(a["values"], a["mask"], shift_mean)}

    golden.check("masked_whiten", whiten)


@pytest.mark.parametrize("case", golden.cases("masked_whiten", raising=True), ids=lambda case: case["note"])
def test_whitening_too_few_tokens_is_finite_where_the_release_raises(case):
    from epo_jax.objectives.advantages import whiten

    a = golden.inputs(case)
    assert jnp.isfinite(whiten(a["values"], a["mask"])).all()


def test_response_mask():
    def mask(a, eos_token):
        return {"mask": released.response_mask(a["response_id"], tuple(np.ravel(eos_token).tolist()))}

    golden.check("get_response_mask", mask)


def test_aggregation():
    def aggregate(a, loss_agg_mode):
        return {"loss": released.aggregate(a["loss_mat"], a["loss_mask"], loss_agg_mode)}

    golden.check("agg_loss", aggregate)


def test_unknown_aggregation_is_refused():
    (case,) = golden.cases("agg_loss", raising=True)
    a = golden.inputs(case)
    with pytest.raises(Exception, match="nope"):
        released.aggregate(a["loss_mat"], a["loss_mask"], "nope")
