"""Operation counts against the compiler's, and the table of peaks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from epo_jax.models.decoder import DecoderConfig, Lora, init_params
from epo_jax.objectives.batch import NO_ARRAYS
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.training import flops
from epo_jax.training.policy_tokens import head_inputs
from tests import tiny

MODEL = DecoderConfig(512, 64, 2, 4, 2, 16, 192)
ROW, POLICY = 96, 32


def compilers_count(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def counted(model, contexts, policy_tokens):
    """What a program counts that computes the scores of masked tokens too."""
    weights, adapters, attention = flops.context_flops(model, contexts)
    pairs = sum(n * (n + 1) / 2 for n in contexts)
    return weights + adapters + attention * sum(n * n for n in contexts) / pairs + flops.head_flops(model, policy_tokens)


@pytest.mark.parametrize("lora", [None, Lora(8, 16.0)])
def test_a_forward_pass_is_what_the_compiler_counts(lora):
    """But for what is no product: norms, rotations, activations, the softmax; a few per cent."""
    model = dataclasses.replace(MODEL, lora=lora)
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    wide, narrow = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (ROW, POLICY))

    def logits(params, *rows):
        names = ("tokens", "positions", "segment_ids", "index", "label")
        hidden, head = head_inputs(model, params, NO_ARRAYS._replace(**dict(zip(names, rows, strict=True))))
        return hidden @ head.T

    found = compilers_count(logits, params, wide, wide, wide, narrow, narrow)
    assert found == pytest.approx(counted(model, [ROW], POLICY), rel=0.05)


def test_a_backward_pass_is_twice_the_forward_pass():
    """The compiler's count of a matrix product and of its gradients, as `update_flops` takes it."""
    x, w = jnp.ones((16, 32)), jnp.ones((32, 64))
    forward = compilers_count(lambda x, w: x @ w, x, w)
    both = compilers_count(jax.grad(lambda x, w: jnp.square(x @ w).sum(), (0, 1)), x, w)
    frozen = compilers_count(jax.grad(lambda x, w: jnp.square(x @ w).sum()), x, w)
    assert both == pytest.approx(3 * forward, rel=0.1) and frozen == pytest.approx(2 * forward, rel=0.1)


def test_windows_and_contexts():
    """Tokens see their own context, and of it no more than the window."""
    seen = {length: flops.context_flops(MODEL, [length])[2] for length in (1, 6, 12)}
    assert seen[12] / seen[1] == 78 and flops.context_flops(MODEL, [6, 6])[2] == 2 * seen[6]
    windows = dataclasses.replace(MODEL, windows=(4, 0))
    pairs = [min(i, 4) for i in range(1, 13)], range(1, 13)
    assert flops.context_flops(windows, [12])[2] == sum(map(sum, pairs)) * seen[1] / 2


def test_what_an_update_consists_of():
    contexts, policy = [40, 24], 12
    base = flops.sampling_flops(tiny.MODEL, contexts, policy)

    def of(arm, **choices):
        return flops.update_flops(tiny.learner(arm, **choices)[0], contexts, policy) / base

    head = flops.head_flops(tiny.MODEL, policy) / base
    assert of("grpo", kl="none") == pytest.approx(3)
    assert of("grpo", kl="k3") == pytest.approx(4)
    assert of("grpo", kl="none", truncated_importance=True) == pytest.approx(4)
    assert of("ppo", kl="none") == pytest.approx(3 + 4 * (1 - head))
    config = dataclasses.replace(tiny.learner("grpo", kl="full")[0], epochs=3)
    assert flops.update_flops(config, contexts, policy) / base == pytest.approx(3 * 4)


def test_the_peak_goes_by_the_kind_of_device():
    assert flops.peak("TPU v5 lite") == 197e12 and flops.peak("TPU v5") == flops.peak("TPU v5p") == 459e12
    assert flops.peak("NVIDIA H100 80GB HBM3") == 989e12 and flops.peak("NVIDIA H100 PCIe") == 756e12
    assert flops.peak("NVIDIA A100-SXM4-80GB") == 312e12 and flops.peak("NVIDIA L40") is None and flops.peak("cpu") is None


def test_rates_have_a_share_where_the_peak_is_known(monkeypatch):
    config = tiny.learner("grpo", kl="none")[0]
    t = Trajectory(task={"id": "0", "type": "t"})
    t.append_prompt([1, 2, 3])
    t.append_answer([4, 5], [0.0] * 2, [0.0] * 2)
    row = flops.rates(config, [t, t], [t], 2.0, 0.5, 4)
    need = flops.sampling_flops(config.model, [5], 2)
    assert row == {"rollout_flops_per_second": need, "update_flops_per_second": pytest.approx(6 * need)}
    monkeypatch.setattr(flops, "peak", lambda kind: 100 * need)
    row = flops.rates(config, [t, t], [t], 2.0, 0.5, 4)
    assert (row["rollout_mfu"], row["update_mfu"]) == pytest.approx((1 / 400, 6 / 400))
