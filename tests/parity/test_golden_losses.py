"""Policy, value, KL and entropy losses of the release, forward and backward."""

import jax.numpy as jnp
import pytest

from epo_jax.objectives import policy, value
from epo_jax.objectives.head import log_prob_entropy_from_logits
from epo_jax.objectives.spec import Hyper
from epo_jax.parity import released
from tests.parity import actor, golden

KL_NAMES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


def surrogate(a, cliprange=0.2, cliprange_low=None, cliprange_high=None, clip_ratio_c=3.0, loss_agg_mode="token-mean"):
    low, high = (cliprange if bound is None else bound for bound in (cliprange_low, cliprange_high))
    hyper = Hyper(clip_low=low, clip_high=high, dual_clip=clip_ratio_c)
    log_prob, old, advantage, mask = (a[k] for k in ("log_prob", "old_log_prob", "advantages", "response_mask"))
    return actor.surrogate(log_prob, old, advantage, mask, hyper, loss_agg_mode, a.get("entropy_mask"))[1]


def value_loss(a, cliprange_value, loss_agg_mode):
    part = value.value_loss(a["vpreds"], a["values"], a["returns"], cliprange_value)
    mask = a["response_mask"]
    return {
        "vf_loss": actor.aggregate(part.loss, mask, loss_agg_mode),
        "vf_clipfrac": released.masked_mean(part.clipped, mask),
    }


def kl(a, kl_penalty):
    return {"kl": policy.kl_estimate(a["logprob"], a["ref_logprob"], KL_NAMES.get(kl_penalty, kl_penalty))}


def kl_in_reward(a, kl_ratio):
    difference = policy.kl_estimate(a["old_log_prob"], a["ref_log_prob"], "k1")
    return {"rewards": a["token_level_scores"] - kl_ratio * difference}


def adaptive_kl(a, init_kl_coef, target_kl, horizon):
    coef, values = init_kl_coef, []
    for measured, samples in zip(a["current_kl"], a["n_steps"], strict=True):
        samples = samples.astype(jnp.float32)
        coef = policy.adaptive_kl_coef(coef, measured, target_kl, horizon, samples)
        values.append(coef)
    return {"value": jnp.stack(values)}


def entropy(a):
    return {"entropy": log_prob_entropy_from_logits(a["logits"], jnp.zeros(a["logits"].shape[:-1], jnp.int32))[1]}


def log_prob(a):
    return {"logprobs": log_prob_entropy_from_logits(a["logits"], a["labels"])[0]}


def entropy_loss(a, loss_agg_mode):
    return {"loss": actor.aggregate(entropy(a)["entropy"], a["response_mask"], loss_agg_mode)}


REPRODUCED = {
    "compute_policy_loss": surrogate,
    "compute_policy_loss_with_entropy_mask": surrogate,
    "compute_value_loss": value_loss,
    "kl_penalty": kl,
    "compute_rewards": kl_in_reward,
    "AdaptiveKLController.update": adaptive_kl,
    "entropy_from_logits": entropy,
    "logprobs_from_logits": log_prob,
    "compute_entropy_loss": entropy_loss,
}
OVER_VOCABULARY = ("entropy_from_logits", "logprobs_from_logits", "compute_entropy_loss")


@pytest.mark.parametrize("function", REPRODUCED)
def test_golden_losses(function):
    golden.check(function, REPRODUCED[function], rtol=1e-4 if function in OVER_VOCABULARY else 1e-5)
