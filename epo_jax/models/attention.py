"""Attention over packed rows (learner) and over a cache (sampler).

A packed row holds several segments. A token attends to itself and earlier tokens of its segment; with a `window`, only to the
last `window` of these. The tokens of a segment are contiguous, so a window is a band of the row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from epo_jax.common.errors import UserError
from epo_jax.parallel import mesh

# The name, in rematerialization policies, of what attention saves for its backward pass: output and normalizer. Queries, keys
# and values are larger together and cheap to recompute.
SAVED = "attention"

TPU_ROWS = 128

_MASKED = -1e30


@jax.named_scope("attention")
def packed_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
    window: int | None = None,
) -> Float[Array, "B T H d"]:
    """Attention within packed rows, with the platform's kernel.

    A mesh shards rows and heads.
    """
    kernel = {"gpu": gpu_attention, "tpu": tpu_attention}.get(mesh.platform(), blocked_attention)
    queries, keys = ("rows", "row_tokens", "heads", "head_dim"), ("rows", "row_tokens", "kv_heads", "head_dim")
    attend = mesh.locally(functools.partial(kernel, window=window), (queries, keys, keys, ("rows", "row_tokens")), queries)
    return attend(q, k, v, segment_ids)


def check_rows(tokens: int) -> None:
    """Raises UserError if the platform's kernel cannot take rows of `tokens` (`config.train.rows_tokens`)."""
    if mesh.platform() == "tpu" and tokens % TPU_ROWS:
        raise UserError(
            f"config.train.rows_tokens={tokens} must be a multiple of {TPU_ROWS} on TPUs, the width of their registers; "
            f"choose {-(-tokens // TPU_ROWS) * TPU_ROWS}."
        )


def gpu_attention(q, k, v, segment_ids, window: int | None = None) -> Float[Array, "B T H d"]:
    """cuDNN's flash attention for half precision, XLA's attention for float32."""
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(
        q, k, v, mask=same, is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="xla" if q.dtype == jnp.float32 else "cudnn",
    )  # fmt: skip


def tpu_attention(q, k, v, segment_ids, window: int | None = None) -> Float[Array, "B T H d"]:
    """Splash attention; T must be a multiple of TPU_ROWS."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # a tenth of a second, for TPUs only

    t, h = q.shape[1:3]
    shape = (t, t)
    band = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mha_single_device(splash.MultiHeadMask([band] * h), residual_checkpoint_name=SAVED)

    def row(q, k, v, segments):
        return kernel(q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1), splash.SegmentIds(segments, segments))

    return jax.vmap(row)(q * q.shape[-1] ** -0.5, k, v, segment_ids).swapaxes(1, 2)


def blocked_attention(q, k, v, segment_ids, window: int | None = None) -> Float[Array, "B T H d"]:
    """Attention in plain XLA, written for CPUs.

    A block of queries multiplies earlier keys only, which skips most of what a causal mask would discard. With heads before
    tokens, and the queries of a key head next to each other, every product is a plain matrix product, which a CPU computes three
    times faster than the same einsum. The backward pass recomputes a block's weights from their normalizer.
    """
    b, t, h, d = q.shape
    kv = k.shape[2]
    q = (q * d**-0.5).reshape(b, t, kv, h // kv, d).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    return _blocked(window, q, k, v, _earliest(segment_ids, window)).transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


def _blocks(t: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, end of queries, first key) of each block: 128 queries, or a sixteenth of a long row."""
    size = max(128, -(-t // 16))
    starts = range(0, t, size)
    return [(i, min(i + size, t), 0 if window is None else max(i - window + 1, 0)) for i in starts]


def _earliest(segment_ids, window: int | None) -> Int[Array, "B T"]:
    """The first column that each token attends to: the beginning of its segment or of its window."""
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    begins = segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    begun = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    return begun if window is None else jnp.maximum(begun, places - window + 1)


def _scores(q, k, earliest, block) -> Float[Array, "B K G q k"]:
    """Masked logits of one block; `q` and `k` are those of all blocks.

    The mask needs one number per query and none per key. Comparing the segments of every pair, sliced in a loop over
    micro-batches, would prevent vectorization in XLA:CPU and take longer than the products.
    """
    start, end, first = block
    q = q[:, :, :, start:end]
    b, kv, groups, n, d = q.shape
    scores = jnp.matmul(q.reshape(b, kv, groups * n, d), k[:, :, first:end].swapaxes(2, 3), preferred_element_type=jnp.float32)
    i, j = jnp.arange(start, end)[:, None], jnp.arange(first, end)[None]
    mask = (j <= i)[None] & (j[None] >= earliest[:, start:end, None])
    return jnp.where(mask[:, None, None], scores.reshape(b, kv, groups, n, end - first), _MASKED)


def _visible(key, query, window: int | None) -> Bool[Array, "..."]:
    """Whether the token at position `query` attends to the one at `key`."""
    return key <= query if window is None else (key <= query) & (key > query - window)


def _flat(x):
    """Merges the queries of all heads that share a key head: [B K G q x] -> [B K Gq x]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(window, q, k, v, earliest):
    """q [B K G T d] (scaled), k and v [B K T d] -> [B K G T d]."""
    return _blocked_forward(window, q, k, v, earliest)[0]


def _blocked_forward(window, q, k, v, earliest):
    out, normaliser = [], []
    for block in _blocks(q.shape[3], window):
        scores = _scores(q, k, earliest, block)
        largest = scores.max(axis=-1, keepdims=True)
        exponent = jnp.exp(scores - largest)
        total = exponent.sum(axis=-1, keepdims=True)
        values = v[:, :, block[2] : block[1]]
        weighted = jnp.matmul(_flat(exponent).astype(v.dtype), values, preferred_element_type=jnp.float32)
        out.append((weighted.reshape(*scores.shape[:4], -1) / total).astype(v.dtype))
        normaliser.append(largest + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(out, axis=3), SAVED)
    normaliser = checkpoint_name(jnp.concatenate(normaliser, axis=3), SAVED)
    return out, (q, k, v, earliest, out, normaliser)


def _blocked_backward(window, residuals, g):
    q, k, v, earliest, out, normaliser = residuals
    delta = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for block in _blocks(q.shape[3], window):
        start, end, first = block
        weights = jnp.exp(_scores(q, k, earliest, block) - normaliser[:, :, :, start:end])
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


@jax.named_scope("attention")
def cached_attention(
    q: Float[Array, "S T H d"],
    keys: Float[Array, "S K d C"],
    values: Float[Array, "S K C d"],
    positions: Int[Array, "S T"],
    ends: Int[Array, " T"],
    window: int | None = None,
) -> Float[Array, "S T H d"]:
    """Attention of new tokens over a cache that already contains them.

    If there are several new tokens, blocks of queries loop over blocks of keys with the running maximum and sum of flash
    attention (arXiv 2205.14135): the scores of a block fit in a CPU core's cache, and unused positions are not read.

    Args:
        positions: of the new tokens in their rows; a token attends to positions up to its own, with a `window` to the last
            `window` of these.
        ends: for each column, one past the last position that a token there attends to in any row.
    """
    s, t, h, d = q.shape
    kv, capacity = keys.shape[1], keys.shape[-1]
    q = (q * d**-0.5).reshape(s, t, kv, h // kv, d).transpose(0, 2, 3, 1, 4)

    def scores(q, positions, keys, start, first) -> Float[Array, "S K G q k"]:
        """Masked logits of keys from position `start`; `first` is the first unmasked one."""
        logits = jnp.matmul(_flat(q), keys.astype(q.dtype), preferred_element_type=jnp.float32)
        at = (start + jnp.arange(keys.shape[-1]))[None, None]
        seen = (at >= first) & _visible(at, positions[..., None], window)
        return jnp.where(seen[:, None, None], logits.reshape(*q.shape[:4], -1), _MASKED)

    def weighted(weights, values) -> Float[Array, "S K G q d"]:
        out = jnp.matmul(_flat(weights).astype(q.dtype), values.astype(q.dtype), preferred_element_type=jnp.float32)
        return out.reshape(*weights.shape[:4], d)

    def of_block(queries) -> Float[Array, "S K G q d"]:
        q, positions, ends = queries
        last = ends.max()

        def over_keys(carry):
            first, largest, total, out = carry
            start = jnp.minimum(first, capacity - size)  # the last block overlaps the one before if blocks do not fit evenly
            block = scores(q, positions, jax.lax.dynamic_slice_in_dim(keys, start, size, axis=3), start, first)
            new = jnp.maximum(largest, block.max(axis=-1, keepdims=True))
            kept, exponent = jnp.exp(largest - new), jnp.exp(block - new)
            out = out * kept + weighted(exponent, jax.lax.dynamic_slice_in_dim(values, start, size, axis=2))
            return first + size, new, total * kept + exponent.sum(axis=-1, keepdims=True), out

        empty = jnp.zeros((*q.shape[:4], 1), jnp.float32)
        carry = jnp.int32(0), empty + _MASKED, empty, jnp.zeros(q.shape, jnp.float32)
        _, _, total, out = jax.lax.while_loop(lambda carry: carry[0] < last, over_keys, carry)
        return out / jnp.maximum(total, 1.0)  # a token that attends to nothing is padding

    if t == 1:
        out = weighted(jax.nn.softmax(scores(q, positions, keys, 0, 0), axis=-1), values)
    else:
        queries, size = (min(length, n) for length, n in zip((t, capacity), _block_sizes(), strict=True))
        blocks = -(-t // queries)
        padding = blocks * queries - t
        q = jnp.pad(q, [(0, 0)] * 3 + [(0, padding), (0, 0)]).reshape(s, kv, h // kv, blocks, queries, d)
        positions = jnp.pad(positions, ((0, 0), (0, padding))).reshape(s, blocks, queries)
        ends = jnp.pad(ends, (0, padding)).reshape(blocks, queries)
        out = jax.lax.map(of_block, (jnp.moveaxis(q, 3, 0), jnp.moveaxis(positions, 1, 0), ends))
        out = jnp.moveaxis(out, 0, 3).reshape(s, kv, h // kv, -1, d)[:, :, :, :t]
    return out.transpose(0, 3, 1, 2, 4).reshape(s, t, h, d).astype(q.dtype)


def _block_sizes() -> tuple[int, int]:
    """(queries, keys) of a block; on a CPU the scores of one row's heads fit in a core's cache."""
    return (64, 128) if mesh.platform() == "cpu" else (256, 512)
