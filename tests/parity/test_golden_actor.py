"""The release's entropy smoothing and its whole actor update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives.entropy import phase_weight
from epo_jax.objectives.head import log_prob_entropy_from_logits
from epo_jax.objectives.spec import Hyper
from tests.parity import actor, golden

OPTIONAL = ("entropy_mask_ratio", "kl_loss")


def corridor(name, inside):
    """The value of each token, `inside` or outside the corridor, and the share inside."""

    def values(a, mask_mode, min_ratio=0.8, max_ratio=1.2, out_range_penalty=0.1):
        if not a["entropy_history"].size:
            # One tensor of ones, which the release's update then refuses: see test_golden_raising.
            return {name: jnp.ones(a["entropy"].shape if mask_mode == "token" else a["entropy"].shape[:1])}
        penalty = actor.PenaltyConfig(low=min_ratio, high=max_ratio, scope=mask_mode)
        outside = actor.outside_corridor(a["entropy"], a["entropy_history"], a["rollout_step"], penalty)
        return {name: jnp.where(outside > 0, out_range_penalty, inside), "within_ratio": 1.0 - outside.mean()}

    return values


def epoch_weight(a):
    epochs = zip(a["current_epoch"].tolist(), a["max_epochs"].tolist(), strict=True)
    return {"weight": [phase_weight("two_stage", epoch, total) for epoch, total in epochs]}


def actor_update(a, **k):
    """The release's update of a table of logits by plain gradient descent, and its metrics by micro-batch; NaN for a metric
    that is not there."""
    hyper = Hyper(
        lam=k["entropy_coeff"], clip_low=k["clip_ratio_low"], clip_high=k["clip_ratio_high"],
        dual_clip=k["clip_ratio_c"], kl_coef=k["kl_loss_coef"],
    )  # fmt: skip
    penalty = None
    if k["entropy_smooth"]:
        penalty = actor.PenaltyConfig(
            k["entropy_smooth_coeff"], k["entropy_smooth_min_ratio"], k["entropy_smooth_max_ratio"],
            k["entropy_smooth_out_range_penalty"], k["entropy_smooth_mask_mode"], k["max_step"] // 2,
        )  # fmt: skip
    length = a["responses"].shape[1]
    mask = a.get("loss_mask", a["attention_mask"])[:, -length:].astype(jnp.float32)

    def loss(table, rows):
        logits = table[a["input_ids"][rows, -length - 1 : -1]]
        log_prob, entropy = log_prob_entropy_from_logits(logits, a["responses"][rows], k["temperature"])
        old = a["old_log_probs"][rows]
        return actor.actor_loss(
            log_prob, entropy, old, a.get("ref_log_prob", a["old_log_probs"])[rows], a["advantages"][rows], mask[rows],
            a["rollout_step"][rows], a["entropy_history"], k["epoch"], hyper, k["loss_agg_mode"],
            "k3" if k["use_kl_loss"] else "none", penalty, k["enable_smooth_weights"],
        )  # fmt: skip

    table, metrics = a["table"], []
    mini, micro = k["ppo_mini_batch_size"], k["ppo_micro_batch_size_per_gpu"]
    for start in range(0, mask.shape[0], mini):
        gradient = jnp.zeros_like(table)
        for first in range(start, start + mini, micro):
            part, values = jax.grad(loss, has_aux=True)(table, slice(first, first + micro))
            gradient += part * (micro / mini)
            metrics.append(values)
        metrics[-1]["grad_norm"] = jnp.linalg.norm(gradient)
        table -= gradient
    by_name = {name: jnp.stack([m[name] for m in metrics if name in m]) for name in metrics[-1]}
    return {**dict.fromkeys(OPTIONAL, np.full(1, np.nan)), **by_name, "grad_table": a["table"] - table}


REPRODUCED = {
    "generate_entropy_penalty": corridor("penalty", 0.0),
    "generate_entropy_mask": corridor("mask", 1.0),
    "_calculate_epoch_based_entropy_weight": epoch_weight,
    "DataParallelPPOActor.update_policy": actor_update,
}
OVER_VOCABULARY = ("DataParallelPPOActor.update_policy",)


@pytest.mark.parametrize("function", REPRODUCED)
def test_golden_actor(function):
    golden.check(function, REPRODUCED[function], rtol=1e-4 if function in OVER_VOCABULARY else 1e-5, compiled=False)
