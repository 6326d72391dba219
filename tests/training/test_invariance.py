"""An RL step's gradient and metrics depend on neither rows, micro-batches, the order of episodes nor devices.

Every estimator, overlay, scope, average and divergence, with conversations and with windows, whose episodes lie in many rows.
One program serves several splits: in micro-batches of eight rows, a live row among seven empty ones is a micro-batch of one.
"""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from epo_jax.models.decoder import param_axes
from epo_jax.objectives import entropy, registry, spec
from epo_jax.objectives.batch import TokenBatch
from epo_jax.parallel import mesh
from epo_jax.rollout.packing import BatchShape, pack
from epo_jax.settings.table import Aggregation, Penalty, PenaltyScope
from epo_jax.training.state import init_state_on
from epo_jax.training.step import batch_shardings, make_train_step
from tests import tiny
from tests.rollout.test_windows import EPISODE_TOKENS, split

MICRO_ROWS, ROWS = 8, 80
# A corridor that is left on both sides, and coefficients with which every term counts.
STRONG = {"lam": 0.3, "alpha": 2.0, "kappa_l": 0.97, "kappa_r": 1.03, "kl_coef": 0.3, "cov_fraction": 0.3, "cov_low": -1e3,
          "cov_high": 1e3, "target_entropy": 9.0, "target_delta": 0.1, "target_cap": 1.0, "peak_quantile": 0.5}  # fmt: skip
CASES: dict[str, dict] = {
    "ppo+epo_turn": {"penalty_scope": "turn", "aggregation": "trajectory", "gae_lambda": 0.8},
    "grpo+epo_two_sided": {"penalty_scope": "trajectory", "kl": "k1", "kappa_l": 0.97, "kappa_r": 1.03},
    "gigpo+epo_decay+epo_decay_steps": {"alpha": 2.0, "penalty_scope": "batch", "aggregation": "seq-mean-token-sum", "kl": "k2"},
    "rloo+epo_paper+epo_indicator": {
        "penalty_scope": "trajectory",
        "turn_gate": True,
        "kl": "abs",
        "alpha": 2.0,
        "kappa_l": 0.97,
        "kappa_r": 1.03,
    },
    "reinforce_pp+epo_wo_dw": {"ratio_scope": "turn", "entropy_aggregation": "token-mean", "kl": "none"},
    "reinforce_pp_baseline+ea": {"kl": "full", "ratio_scope": "trajectory"},
    "dr_grpo+empg": {"kl_place": "reward"},
    "dapo+clip_cov": {},
    "gspo+epo+epo_initial+epo_mean_dw": {"penalty_scope": "trajectory", "clip_low": 0.05, "clip_high": 0.05},
    "gspo+kl_cov": {},
    "grpo+siren": {"entropy_aggregation": "seq-mean-token-mean"},
    "grpo+target": {"truncated_importance": True, "importance_cap": 1.2},
    "ppo+epo_base": {"gae_scope": "turn", "ratio_scope": "trajectory", "whiten": False},
    "grpo+released": {},
}


def test_every_choice_is_tried():
    tried = {arm: tiny.learner(arm, **choices)[0].objective for arm, choices in CASES.items()}
    for field, values in {
        "estimator": registry.ESTIMATORS, "shaper": registry.SHAPERS, "token_control": registry.TOKEN_CONTROLS,
        "entropy_term": registry.ENTROPY_TERMS, "coefficient": registry.COEFFICIENTS, "ratio_scope": get_args(spec.Scope),
        "penalty_scope": get_args(PenaltyScope), "aggregation": get_args(Aggregation), "kl": get_args(spec.KLKind),
        "penalty": get_args(Penalty),
    }.items():  # fmt: skip
        assert {getattr(objective, field) for objective in tried.values()} == set(values), field
    assert {overlay for arm in CASES for overlay in arm.split("+")[1:]} == set(registry.VARIANTS)


@functools.cache
def trajectories(style: str):
    """Episodes whose recorded log-probabilities are not the policy's, so that ratios are not 1 and clips decide."""
    rng, out = np.random.default_rng(0), tiny.episodes(0)
    for t in out:
        t.log_prob = [x + rng.normal(0, 0.3) if turn >= 0 else 0.0 for x, turn in zip(t.log_prob, t.turn, strict=True)]
    return [split(t) for t in out] if style == "window" else out


def packed(style: str, episodes, order=None) -> TokenBatch:
    contexts = tiny.TURNS if style == "window" else 1
    return pack(episodes, BatchShape(24, 12, tiny.TURNS, 1, ROWS, contexts), order)


def spread(batch: TokenBatch, live: int) -> TokenBatch:
    """The same rows, `live` of them in each micro-batch."""
    count = int(batch.rows[0])
    places = [row // live * MICRO_ROWS + row % live for row in range(count)]
    moved = {}
    for name, x in batch.by_row()._asdict().items():
        if x is not None:
            moved[name] = np.zeros_like(x)
            moved[name][0, places] = x[0, :count]
    return batch._replace(**moved, rows=np.array([places[-1] + 1], np.int32))


def config_of(arm: str, style: str, micro_rows: int = MICRO_ROWS):
    """(LearnerConfig, Hyper, fields of the state): with an earlier step, another reference policy and another critic."""
    own = registry.settings_of(arm)
    config, hyper = tiny.learner(arm, micro_rows, **{k: v for k, v in STRONG.items() if k not in own} | CASES[arm])
    config = dataclasses.replace(config, episode_policy_tokens=EPISODE_TOKENS if style == "window" else None)
    width = tiny.TURNS if config.objective.history_index == "turn" else 1
    history = entropy.init_history(config.total_steps, width if width > 1 else None)
    fields = {"history": entropy.append(history, jnp.full(width, 2.4), jnp.ones(width)), "step": jnp.int32(1)}
    if config.reference:
        fields["reference"] = tiny.as_params(tiny.parameters(1))
    if config.critic_optim:
        fields["critic"] = tiny.critic()
    return config, hyper, jax.tree.map(np.asarray, fields)  # of the host: a step's state is given away


@functools.cache
def step_of(arm: str, style: str, micro_rows: int = MICRO_ROWS):
    config, hyper, fields = config_of(arm, style, micro_rows)
    example = tiny.start(config, **fields), packed(style, trajectories(style)), hyper
    compiled = make_train_step(config).lower(*example).compile()
    return lambda batch: compiled(tiny.start(config, **fields), batch, hyper)


def gradient_and_metrics(result):
    state, metrics = result
    moment = optax.tree_utils.tree_get(state.opt_state, "mu")
    return jax.tree.map(lambda m: np.asarray(m) / 0.1, moment), {k: float(v) for k, v in metrics.items()}, state.history.values


def assert_same(one, other):
    """Sums of at most a few hundred float32 terms in another order: 1e-5 of the largest entry is far above their rounding,
    about 1e-6 of it, and far below what a mean over part of an episode does (1e-2)."""
    (gradient, metrics, history), (others_gradient, others_metrics, others_history) = one, other
    largest = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
    assert largest > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), gradient, others_gradient)
    for name, value in metrics.items():
        assert others_metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    np.testing.assert_allclose(history, others_history, rtol=1e-5)


@pytest.mark.parametrize("style", ["chat", "window"])
@pytest.mark.parametrize("arm", CASES)
def test_rows_micro_batches_and_order_change_nothing(arm, style):
    episodes, step = trajectories(style), step_of(arm, style)
    dense = packed(style, episodes)
    assert 2 < dense.rows[0] <= ROWS / MICRO_ROWS
    expected = gradient_and_metrics(step(dense))
    order = np.random.default_rng(1).permutation(len(episodes))
    splits = {"one row a micro-batch": spread(dense, 1), "two rows a micro-batch": spread(dense, 2)}
    splits["other rows"] = packed(style, episodes, order)
    if "released" not in arm:  # its mini-batches are cut in the order of the episodes
        splits["other episodes first"] = packed(style, [episodes[i] for i in order])
    for batch in splits.values():
        assert_same(expected, gradient_and_metrics(step(batch)))


@pytest.mark.parametrize("arm", ["gspo+epo+epo_initial+epo_mean_dw", "grpo+epo_two_sided"])
def test_micro_batch_rows_as_a_run_sets_them(arm):
    batch = packed("window", trajectories("window"))
    expected = gradient_and_metrics(step_of(arm, "window")(batch))
    for micro_rows in (1, 2):
        assert_same(expected, gradient_and_metrics(step_of(arm, "window", micro_rows)(batch)))


@pytest.mark.parametrize("arm", ["gspo+epo+epo_initial+epo_mean_dw", "rloo+epo_paper+epo_indicator"])
def test_two_passes_are_one_where_episodes_lie_in_one_row(arm):
    """The gradient by slopes against the plain gradient of the loss."""
    batch = packed("chat", trajectories("chat"))
    config, hyper, fields = config_of(arm, "chat")
    config = dataclasses.replace(config, episode_policy_tokens=EPISODE_TOKENS)
    by_slopes = make_train_step(config)(tiny.start(config, **fields), batch, hyper)
    assert_same(gradient_and_metrics(step_of(arm, "chat")(batch)), gradient_and_metrics(by_slopes))


@pytest.mark.parametrize("arm", ["gspo+epo+epo_initial+epo_mean_dw", "dapo+clip_cov"])
def test_devices_change_nothing(arm):
    batch = packed("window", trajectories("window"))
    config, hyper, fields = config_of(arm, "window")
    on = mesh.make_mesh(8, 1, 1)
    params = tiny.as_params()
    state = init_state_on(config, jax.device_put(params, mesh.shardings(on, params, param_axes(config.model))), on)
    state = state._replace(**jax.device_put(fields, jax.tree.map(lambda _: mesh.replicated(on), fields)))
    placed = mesh.place(batch, batch_shardings(on)), jax.device_put(hyper, mesh.replicated(on))
    sharded = make_train_step(config, on)(state, *placed)
    assert_same(gradient_and_metrics(step_of(arm, "window")(batch)), gradient_and_metrics(sharded))
