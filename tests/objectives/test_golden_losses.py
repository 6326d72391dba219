"""Policy, value, KL and entropy losses of the release, forward and backward."""

import jax.numpy as jnp
import numpy as np

from epo_jax.objectives import policy, released, value
from epo_jax.objectives.head import log_prob_entropy_from_logits
from epo_jax.objectives.spec import Hyper
from tests.objectives import golden

KL_NAMES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


def surrogate(a, cliprange=0.2, cliprange_low=None, cliprange_high=None, clip_ratio_c=3.0, loss_agg_mode="token-mean"):
    low, high = (cliprange if bound is None else bound for bound in (cliprange_low, cliprange_high))
    hyper = Hyper(clip_low=low, clip_high=high, dual_clip=clip_ratio_c)
    log_prob, old, advantage, mask = (a[k] for k in ("log_prob", "old_log_prob", "advantages", "response_mask"))
    return released.surrogate(log_prob, old, advantage, mask, hyper, loss_agg_mode, a.get("entropy_mask"))[1]


def test_policy_loss():
    golden.check("compute_policy_loss", surrogate)


def test_policy_loss_with_entropy_mask():
    golden.check("compute_policy_loss_with_entropy_mask", surrogate)


def test_value_loss():
    def loss(a, cliprange_value, loss_agg_mode):
        part = value.value_loss(a["vpreds"], a["values"], a["returns"], cliprange_value)
        mask = a["response_mask"]
        return {
            "vf_loss": released.aggregate(part.loss, mask, loss_agg_mode),
            "vf_clipfrac": released.masked_mean(part.clipped, mask),
        }

    golden.check("compute_value_loss", loss)


def test_kl_penalty():
    def kl(a, kl_penalty):
        return {"kl": policy.kl_estimate(a["logprob"], a["ref_logprob"], KL_NAMES.get(kl_penalty, kl_penalty))}

    golden.check("kl_penalty", kl)


def test_kl_in_reward():
    def rewards(a, kl_ratio):
        kl = policy.kl_estimate(a["old_log_prob"], a["ref_log_prob"], "k1")
        return {"rewards": a["token_level_scores"] - kl_ratio * kl}

    golden.check("compute_rewards", rewards)


def test_adaptive_kl_controller():
    (case,) = golden.cases("AdaptiveKLController.update")
    a, settings = golden.arrays(case, "in"), case["kwargs"]
    coef, values = settings["init_kl_coef"], []
    for kl, samples in zip(a["current_kl"].tolist(), a["n_steps"].tolist(), strict=True):
        coef = policy.adaptive_kl_coef(coef, kl, settings["target_kl"], settings["horizon"], samples)
        values.append(coef)
    np.testing.assert_allclose(values, golden.arrays(case, "out")["value"], rtol=1e-5)


def test_entropy_from_logits():
    def entropy(a):
        return {"entropy": log_prob_entropy_from_logits(a["logits"], jnp.zeros(a["logits"].shape[:-1], jnp.int32))[1]}

    golden.check("entropy_from_logits", entropy, rtol=1e-4)


def test_log_prob_from_logits():
    def log_prob(a):
        return {"logprobs": log_prob_entropy_from_logits(a["logits"], a["labels"])[0]}

    golden.check("logprobs_from_logits", log_prob, rtol=1e-4)


def test_entropy_loss():
    def loss(a, loss_agg_mode):
        labels = jnp.zeros(a["logits"].shape[:-1], jnp.int32)
        entropy = log_prob_entropy_from_logits(a["logits"], labels)[1]
        return {"loss": released.aggregate(entropy, a["response_mask"], loss_agg_mode)}

    golden.check("compute_entropy_loss", loss, rtol=1e-4)
