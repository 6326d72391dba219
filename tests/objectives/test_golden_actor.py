"""The release's entropy smoothing and its whole actor update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives import released
from epo_jax.objectives.entropy import phase_weight
from epo_jax.objectives.head import log_prob_entropy_from_logits
from epo_jax.objectives.spec import Hyper
from tests.objectives import golden


def smoothing(case, inside, outside):
    """Value per token: `inside` or `outside` the corridor; and the share inside. None where the history is empty."""
    a, settings = golden.inputs(case), case["kwargs"]
    if not a["entropy_history"].size:
        return None
    penalty = released.PenaltyConfig(
        low=settings.get("min_ratio", 0.8), high=settings.get("max_ratio", 1.2), scope=settings["mask_mode"]
    )
    out = released.outside_corridor(a["entropy"], a["entropy_history"][a["rollout_step"]], penalty)
    return np.where(out, outside, inside), 1.0 - np.mean(out)


@pytest.mark.parametrize(
    "function, name, inside", [("generate_entropy_penalty", "penalty", 0.0), ("generate_entropy_mask", "mask", 1.0)]
)
def test_corridor(function, name, inside):
    compared = 0
    for case in golden.cases(function):
        expected = golden.arrays(case, "out")
        found = smoothing(case, inside, case["kwargs"].get("out_range_penalty", 0.1))
        if found is None:
            np.testing.assert_array_equal(expected[name], 1.0)  # the release's answer to an empty history
            continue
        np.testing.assert_allclose(found[0], expected[name], rtol=1e-5, err_msg=case["note"])
        np.testing.assert_allclose(found[1], expected["within_ratio"], rtol=1e-5, err_msg=case["note"])
        compared += 1
    assert compared


def test_epoch_weight():
    (case,) = golden.cases("_calculate_epoch_based_entropy_weight")
    a = golden.arrays(case, "in")
    epochs = zip(a["current_epoch"].tolist(), a["max_epochs"].tolist(), strict=True)
    found = [phase_weight("released", epoch, total) for epoch, total in epochs]
    np.testing.assert_allclose(found, golden.arrays(case, "out")["weight"], rtol=1e-5)


def actor_update(case):
    """The release's update of a table of logits by plain gradient descent: (descent, metrics per micro-batch)."""
    a, k = golden.inputs(case), case["kwargs"]
    hyper = Hyper(
        lam=k["entropy_coeff"], clip_low=k["clip_ratio_low"], clip_high=k["clip_ratio_high"],
        dual_clip=k["clip_ratio_c"], kl_coef=k["kl_loss_coef"],
    )  # fmt: skip
    penalty = None
    if k["entropy_smooth"]:
        penalty = released.PenaltyConfig(
            k["entropy_smooth_coeff"], k["entropy_smooth_min_ratio"], k["entropy_smooth_max_ratio"],
            k["entropy_smooth_out_range_penalty"], k["entropy_smooth_mask_mode"], k["max_step"] // 2,
        )  # fmt: skip
    length = a["responses"].shape[1]
    mask = a.get("loss_mask", a["attention_mask"])[:, -length:].astype(jnp.float32)

    def loss(table, rows):
        logits = table[a["input_ids"][rows, -length - 1 : -1]]
        log_prob, entropy = log_prob_entropy_from_logits(logits, a["responses"][rows], k["temperature"])
        old = a["old_log_probs"][rows]
        return released.actor_loss(
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
    return a["table"] - table, metrics


@pytest.mark.parametrize("case", golden.cases("DataParallelPPOActor.update_policy"), ids=lambda case: case["case"])
def test_actor_update(case):
    descent, metrics = actor_update(case)
    for name, expected in golden.arrays(case, "out").items():
        if name == "grad_table":
            np.testing.assert_allclose(descent, expected, rtol=1e-4, atol=1e-6)
            continue
        found = [m[name] for m in metrics if name in m] or np.nan
        np.testing.assert_allclose(np.ravel(found), np.ravel(expected), rtol=1e-4, atol=1e-6, err_msg=name)
