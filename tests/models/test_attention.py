"""Each platform's attention against the definition, written out with a mask over all pairs."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from epo_jax.common.errors import UserError
from epo_jax.models import attention

WINDOWS = pytest.mark.parametrize("window", [None, 40])


def dense(q, k, v, segment_ids, window):
    t = q.shape[1]
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    back = jnp.arange(t)[:, None] - jnp.arange(t)[None]
    seen = (back >= 0) & (back < (window or t))
    seen = seen[None] & (segment_ids[:, :, None] == segment_ids[:, None])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf)), v)


def problem(t, d=16):
    keys = jax.random.split(jax.random.key(0), 4)
    q = 2.0 * jax.random.normal(keys[0], (2, t, 4, d))
    k, v = (jax.random.normal(key, (2, t, 2, d)) for key in keys[1:3])
    lengths = jnp.array([[t // 3, t - 20], [t // 2, t]])  # two segments, then padding
    segments = (jnp.arange(t)[None, :, None] >= lengths[:, None]).sum(-1)
    return (q, k, v), jnp.where(segments < 2, segments + 1, 0), jax.random.normal(keys[3], q.shape)


@WINDOWS
def test_blocked_attention_and_its_gradient(window):
    """300 tokens are three blocks, the last one short."""
    inputs, segments, weight = problem(300)

    def value_and_gradients(fn):
        def loss(q, k, v):
            out = fn(q, k, v, segments, window)
            return (weight * out).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)

    (_, out), found = value_and_gradients(attention.blocked_attention)
    (_, want), exact = value_and_gradients(dense)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_long_rows_are_cut_into_few_blocks():
    assert len(attention._blocks(16384, None)) == 16 and attention._blocks(300, None)[-1] == (256, 300, 0)
    assert attention._blocks(300, 40)[-1] == (256, 300, 217)


@WINDOWS
def test_gpu_attention_means_the_same(window):
    """In float32 it goes through XLA, with the arguments that cuDNN gets in half precision."""
    inputs, segments, _ = problem(100)
    found = attention.gpu_attention(*inputs, segments, window)
    np.testing.assert_allclose(found, dense(*inputs, segments, window), rtol=1e-4, atol=1e-5)


@WINDOWS
def test_tpu_attention_means_the_same(monkeypatch, window):
    """The splash kernel, interpreted."""
    interpreted = functools.partial(splash_attention.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", interpreted)
    inputs, segments, _ = problem(128, d=64)
    found = attention.tpu_attention(*inputs, segments, window)
    np.testing.assert_allclose(found, dense(*inputs, segments, window), rtol=1e-3, atol=1e-4)


def test_tpus_take_rows_of_whole_registers(monkeypatch):
    for platform, refused in (("cpu", ()), ("gpu", ()), ("tpu", (64, 200))):
        monkeypatch.setattr(attention.mesh, "platform", lambda platform=platform: platform)
        for tokens in (64, 128, 200, 384):
            with pytest.raises(UserError, match=f"={tokens} must be") if tokens in refused else contextlib.nullcontext():
                attention.check_rows(tokens)
    inputs, segments, _ = problem(200, d=64)
    with pytest.raises((ValueError, NotImplementedError)):
        jax.eval_shape(attention.tpu_attention, *inputs, segments)


@WINDOWS
def test_tpu_attention_lowers_with_its_gradient(window):
    shapes = [jax.ShapeDtypeStruct((2, 256, heads, 128), jnp.bfloat16) for heads in (4, 2, 2)]

    def loss(q, k, v, segment_ids):
        return attention.tpu_attention(q, k, v, segment_ids, window).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes, jax.ShapeDtypeStruct((2, 256), jnp.int32))
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(("backend", "chosen"), [("cpu", "blocked"), ("gpu", "gpu"), ("tpu", "tpu")])
def test_the_default_backend_chooses(monkeypatch, backend, chosen):
    inputs, segments, _ = problem(60)
    monkeypatch.setattr(attention.jax, "default_backend", lambda: backend)
    for name in ("blocked", "gpu", "tpu"):
        monkeypatch.setattr(attention, f"{name}_attention", lambda q, *_, name=name, window: q if name == chosen else None)
    assert attention.packed_attention(*inputs, segments) is inputs[0]


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("new, capacity", [(1, 200), (16, 200), (100, 200), (150, 512)])
def test_new_tokens_over_a_cache_see_what_they_may(new, capacity, window):
    """Blocks that fill neither the queries nor the room; rows of several lengths. Room that no token sees is not read."""
    rng = np.random.default_rng(new)
    rows, kv, heads, width = 3, 2, 6, 8
    lengths = np.array([0, 11, 40])
    positions = lengths[:, None] + np.arange(new)
    q, keys, values = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((rows, new, heads, width), (rows, kv, width, capacity), (rows, kv, capacity, width))
    )
    keys[..., 384:], values[:, :, 384:] = np.nan, np.nan
    at = np.arange(capacity)[None, None]
    seen = (at <= positions[..., None]) & (at > positions[..., None] - (window or capacity))
    logits = np.einsum("sthd,shdc->shtc", q, np.repeat(keys, heads // kv, axis=1)[..., :384]) * width**-0.5
    logits = np.where(seen[:, None, :, :384], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("shtc,shcd->sthd", weights, np.repeat(values, heads // kv, axis=1)[:, :, :384])
    if new == 1:
        keys, values = np.nan_to_num(keys), np.nan_to_num(values)  # a single token looks at all of it
    out = jax.jit(attention.cached_attention, static_argnums=5)(q, keys, values, positions, positions.max(0) + 1, window)
    np.testing.assert_allclose(out, expected, atol=2e-6)
