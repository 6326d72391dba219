"""The gradients of the policy term and of the entropy term apart, against those of whole losses with and without lam."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from epo_jax.models import lora
from epo_jax.models.decoder import Lora, param_axes
from epo_jax.parallel import mesh
from epo_jax.training.state import init_state, init_state_on
from epo_jax.training.step import batch_shardings, make_train_step, step_function
from epo_jax.training.step_metrics import GRADIENT_PARTS
from tests import tiny
from tests.training.test_invariance import config_of, packed, trajectories


def measured(config, **model):
    return dataclasses.replace(config, gradient_norms=True, model=dataclasses.replace(config.model, **model))


def start(config, fields):
    params = tiny.as_params()
    if config.model.lora:
        params = lora.join(params, lora.init_adapters(config.model, jax.random.key(3)))
    return init_state(config, params)._replace(**fields)


@functools.cache
def case(name):
    """(config, hyper, fields of the state, batch, train step)"""
    arm, style, model = {
        "adapters": ("ppo+epo_turn", "chat", {"lora": Lora(2, 6.0)}),
        "window, penalty by episode": ("grpo+epo_two_sided", "window", {}),
        "released": ("grpo+released", "chat", {}),
    }[name]
    config, hyper, fields = config_of(arm, style)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, mini_turns=10))  # of the last case
    config, batch = measured(config, **model), packed(style, trajectories(style))
    return config, hyper, fields, batch, make_train_step(config)


def gradient(state):
    """The first update's, from the first moment."""
    return np.asarray(ravel_pytree(optax.tree_utils.tree_get(state.opt_state, "mu"))[0], np.float64) / 0.1


def assert_parts(metrics, whole, policy):
    """`whole` and `policy` are gradients of the loss with lam and without."""
    entropy = whole - policy
    cosine = policy @ entropy / (np.linalg.norm(policy) * np.linalg.norm(entropy))
    found = [float(metrics[name]) for name in GRADIENT_PARTS]
    np.testing.assert_allclose(found, [np.linalg.norm(policy), np.linalg.norm(entropy), cosine], rtol=1e-3)
    assert min(found[:2]) > 1e-3 and abs(cosine) < 0.99


@pytest.mark.parametrize("name", ["adapters", "window, penalty by episode"])
def test_the_parts_are_the_loss_without_lam_and_what_lam_adds(name):
    config, hyper, fields, batch, step = case(name)
    after, metrics = step(start(config, fields), batch, hyper)
    without, metrics_without = step(start(config, fields), batch, hyper._replace(lam=np.float32(0.0)))
    assert_parts(metrics, gradient(after), gradient(without))
    norm, rest, cosine = (metrics_without[name] for name in GRADIENT_PARTS)
    np.testing.assert_allclose(norm, metrics_without["grad_norm"], rtol=1e-6)
    assert rest <= 1e-6 * norm and not abs(cosine) > 1.0 + 1e-6


def test_without_advantages_the_entropy_is_all_there_is():
    """Its gradient written out from dense logits."""
    config, hyper = tiny.learner("grpo+epo", kl="none", format_penalty=0.0, lam=0.3, entropy_aggregation="token-mean")
    config, batch = measured(config), tiny.batched(tiny.episodes(0, uniform=tuple(range(tiny.GROUPS))), 1)

    def entropy(params):
        log_p = tiny.dense_log_p(params, tiny.inputs(batch))
        return -((jnp.exp(log_p) * log_p).sum(-1) * batch.policy_mask[0]).sum() / batch.policy_mask[0].sum()

    _, metrics = make_train_step(config)(tiny.start(config), batch, hyper)
    expected = 0.3 * optax.tree.norm(jax.grad(entropy)(tiny.as_params()))
    np.testing.assert_allclose(metrics["entropy_grad_norm"], expected, rtol=1e-4)
    assert metrics["policy_grad_norm"] == 0.0 and np.isnan(metrics["grad_cosine"])


def test_they_are_of_the_first_update_even_if_the_first_mini_batch_has_nothing_to_train_on():
    """DAPO drops the group in the first of three mini-batches. Without the third, the second is the only update."""
    config, hyper = tiny.learner("dapo+epo", lam=0.3, format_penalty=0.0)
    config, batch = measured(config), tiny.batched(tiny.episodes(0, uniform=(0,)), 3)
    step = make_train_step(config)
    alone = batch._replace(rows=batch.rows * [1, 1, 0], policy_mask=batch.policy_mask * np.array([1, 1, 0])[:, None, None])
    alone = alone._replace(rows=alone.rows.astype(batch.rows.dtype), policy_mask=alone.policy_mask.astype(np.float32))
    _, metrics = step(tiny.start(config), batch, hyper)
    after, metrics_alone = step(tiny.start(config), alone, hyper)
    without, _ = step(tiny.start(config), alone, hyper._replace(lam=np.float32(0.0)))
    assert (metrics["updates"], metrics_alone["updates"]) == (2, 1)
    assert_parts(metrics, gradient(after), gradient(without))
    assert_parts(metrics_alone, gradient(after), gradient(without))


def test_measuring_them_changes_nothing_else():
    config, hyper, fields, batch, step = case("window, penalty by episode")
    off = dataclasses.replace(config, gradient_norms=False)
    (state, metrics), (state_off, metrics_off) = (f(start(config, fields), batch, hyper) for f in (step, make_train_step(off)))
    assert metrics.keys() - metrics_off.keys() == set(GRADIENT_PARTS)
    for name, value in metrics_off.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(gradient(state), gradient(state_off), rtol=0, atol=1e-6 * np.abs(gradient(state)).max())


def test_the_released_step_measures_its_first_update():
    """Of several, so that they do not add up to the mean norm of the whole."""
    config, hyper, fields, batch, step = case("released")
    _, metrics = step(start(config, fields), batch, hyper)
    _, still = step(start(config, fields), batch, hyper._replace(lr=np.float32(0.0)))
    assert metrics["updates"] > 1
    for name in GRADIENT_PARTS:
        assert np.isfinite(metrics[name]) and metrics[name] == still[name]


def test_members_mapped_together_and_devices_of_a_mesh_find_the_same():
    config, hyper, fields, batch, step = case("window, penalty by episode")
    hypers = [hyper, hyper._replace(lam=np.float32(0.02))]
    alone = [step(start(config, fields), batch, each)[1] for each in hypers]
    mapped = jax.jit(jax.vmap(step_function(config), (None, None, 0)))
    _, together = mapped(start(config, fields), batch, jax.tree.map(lambda *x: np.stack(x), *hypers))
    on, params = mesh.make_mesh(8, 1, 1), tiny.as_params()
    state = init_state_on(config, jax.device_put(params, mesh.shardings(on, params, param_axes(config.model))), on)
    state = state._replace(**jax.device_put(fields, jax.tree.map(lambda _: mesh.replicated(on), fields)))
    placed = mesh.place(batch, batch_shardings(on)), jax.device_put(hyper, mesh.replicated(on))
    _, sharded = make_train_step(config, on)(state, *placed)
    for name in GRADIENT_PARTS:
        np.testing.assert_allclose(together[name], [each[name] for each in alone], rtol=1e-3)
        np.testing.assert_allclose(sharded[name], alone[0][name], rtol=1e-3)
