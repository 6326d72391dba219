"""Attention: over packed rows in the learner, by the platform's own kernel, and over a cache in the sampler.

A packed row holds several segments; a token attends to itself and to the earlier tokens of its own segment, with a `window`
only to the last `window` of these. Tokens of one segment lie side by side, so a window is a band of the row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from epo_jax import mesh

# What attention gives its backward pass, by the name that a rematerialisation policy knows it under: output and normaliser.
# Queries, keys and values are larger together, and quickly made again.
SAVED = "attention"

_MASKED = -1e30


def packed_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
    window: int | None = None,
) -> Float[Array, "B T H d"]:
    """Attention among the tokens of packed rows, by the kernel of the platform; on a mesh each device has rows and heads."""
    kernel = {"gpu": gpu_attention, "tpu": tpu_attention}.get(mesh.platform(), blocked_attention)
    heads = P(mesh.ROWS, None, "tensor")
    attend = mesh.locally(functools.partial(kernel, window=window), (heads, heads, heads, P(mesh.ROWS)), heads)
    return attend(q, k, v, segment_ids)


def gpu_attention(q, k, v, segment_ids, window: int | None = None) -> Float[Array, "B T H d"]:
    """cuDNN's flash attention, which knows half precision only; float32 goes through XLA."""
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(
        q, k, v, mask=same, is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="xla" if q.dtype == jnp.float32 else "cudnn",
    )  # fmt: skip


def tpu_attention(q, k, v, segment_ids, window: int | None = None) -> Float[Array, "B T H d"]:
    """Splash attention; rows must be a multiple of 128 tokens."""
    t, h = q.shape[1:3]
    shape = (t, t)
    band = splash_mask.CausalMask(shape) if window is None else splash_mask.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mha_single_device(splash_mask.MultiHeadMask([band] * h), residual_checkpoint_name=SAVED)

    def row(q, k, v, segments):
        return kernel(q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1), splash.SegmentIds(segments, segments))

    return jax.vmap(row)(q * q.shape[-1] ** -0.5, k, v, segment_ids).swapaxes(1, 2)


def blocked_attention(q, k, v, segment_ids, window: int | None = None) -> Float[Array, "B T H d"]:
    """Attention in plain XLA, made for CPUs.

    Queries go in blocks that look at earlier keys only, which skips most of what a causal mask would throw away. With heads
    ahead of tokens, and the queries that share a key side by side, every product is a plain matrix product, which a CPU runs
    three times faster than the same einsum. The backward pass recomputes a block's weights from their normaliser.
    """
    b, t, h, d = q.shape
    kv = k.shape[2]
    q = (q * d**-0.5).reshape(b, t, kv, h // kv, d).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    return _blocked(window, q, k, v, segment_ids).transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


def _blocks(t: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, end of queries, first key) of each block: 128 queries, or a sixteenth of a long row."""
    size = max(128, -(-t // 16))
    starts = range(0, t, size)
    return [(i, min(i + size, t), 0 if window is None else max(i - window + 1, 0)) for i in starts]


def _scores(q, k, segment_ids, block, window) -> Float[Array, "B K G q k"]:
    """Masked logits of one block; `q` and `k` are whole."""
    start, end, first = block
    q = q[:, :, :, start:end]
    b, kv, groups, n, d = q.shape
    scores = jnp.matmul(q.reshape(b, kv, groups * n, d), k[:, :, first:end].swapaxes(2, 3), preferred_element_type=jnp.float32)
    i, j = jnp.arange(start, end)[:, None], jnp.arange(first, end)[None]
    band = j <= i if window is None else (j <= i) & (j > i - window)
    mask = band[None] & (segment_ids[:, start:end, None] == segment_ids[:, None, first:end])
    return jnp.where(mask[:, None, None], scores.reshape(b, kv, groups, n, end - first), _MASKED)


def _flat(x):
    """Queries of all heads that share a key head in one axis: [B K G q x] -> [B K Gq x]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(window, q, k, v, segment_ids):
    """q [B K G T d] (scaled), k and v [B K T d] -> [B K G T d]."""
    return _blocked_forward(window, q, k, v, segment_ids)[0]


def _blocked_forward(window, q, k, v, segment_ids):
    out, normaliser = [], []
    for block in _blocks(q.shape[3], window):
        scores = _scores(q, k, segment_ids, block, window)
        largest = scores.max(axis=-1, keepdims=True)
        exponent = jnp.exp(scores - largest)
        total = exponent.sum(axis=-1, keepdims=True)
        values = v[:, :, block[2] : block[1]]
        weighted = jnp.matmul(_flat(exponent).astype(v.dtype), values, preferred_element_type=jnp.float32)
        out.append((weighted.reshape(*scores.shape[:4], -1) / total).astype(v.dtype))
        normaliser.append(largest + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(out, axis=3), SAVED)
    normaliser = checkpoint_name(jnp.concatenate(normaliser, axis=3), SAVED)
    return out, (q, k, v, segment_ids, out, normaliser)


def _blocked_backward(window, residuals, g):
    q, k, v, segment_ids, out, normaliser = residuals
    delta = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for block in _blocks(q.shape[3], window):
        start, end, first = block
        weights = jnp.exp(_scores(q, k, segment_ids, block, window) - normaliser[:, :, :, start:end])
        queries, gradient = _flat(q[:, :, :, start:end]), _flat(g[:, :, :, start:end])
        keys, values = k[:, :, first:end], v[:, :, first:end]
        incoming = jnp.matmul(gradient, values.swapaxes(2, 3), preferred_element_type=jnp.float32)
        d_scores = _flat(weights * (incoming.reshape(weights.shape) - delta[:, :, :, start:end])).astype(q.dtype)
        dq.append(jnp.matmul(d_scores, keys).reshape(q[:, :, :, start:end].shape))
        dk = dk.at[:, :, first:end].add(jnp.matmul(d_scores.swapaxes(2, 3), queries, preferred_element_type=jnp.float32))
        weights = _flat(weights).astype(g.dtype)
        dv = dv.at[:, :, first:end].add(jnp.matmul(weights.swapaxes(2, 3), gradient, preferred_element_type=jnp.float32))
    return jnp.concatenate(dq, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def cached_attention(
    q: Float[Array, "S T H d"], keys: Float[Array, "S K d C"], values: Float[Array, "S K C d"], mask: Bool[Array, "S T C"]
) -> Float[Array, "S T H d"]:
    """Attention of new tokens over a cache."""
    s, t, h, d = q.shape
    kv = keys.shape[1]
    q = q.reshape(s, t, kv, h // kv, d).transpose(0, 2, 3, 1, 4).reshape(s, kv, h // kv * t, d) * d**-0.5
    scores = jnp.matmul(q, keys.astype(q.dtype), preferred_element_type=jnp.float32).reshape(s, kv, h // kv, t, -1)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _MASKED), axis=-1).astype(q.dtype)
    out = jnp.matmul(weights.reshape(s, kv, h // kv * t, -1), values.astype(q.dtype))
    return out.reshape(s, kv, h // kv, t, d).transpose(0, 3, 1, 2, 4).reshape(s, t, h, d)
