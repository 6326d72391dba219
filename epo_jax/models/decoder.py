"""A decoder-only transformer of the Qwen2 family, in Flax NNX.

Read top to bottom: configuration, one block, the stack. The same block serves the learner (`Decoder.__call__`: packed rows,
no cache) and the sampler (`Decoder.extend`: new tokens appended to a cache), so the two cannot drift apart.

Axes: B rows, S slots, T tokens, C cache length, D width, H query heads, K key/value heads, d head width, L layers, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from epo_jax.models import kv_cache
from epo_jax.models.kv_cache import LayerCache

Params = dict

# Below this depth the layer loop is unrolled: XLA:CPU then fuses across layers and the program stays small.
_UNROLL_LAYERS = 8

# Tokens of a row whose queries are attended together.
_QUERY_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Static shape of a decoder; the field names of a Hugging Face `config.json` are given where they differ.

    Attributes:
        vocab_size: V.
        d_model: D (`hidden_size`).
        num_layers: L (`num_hidden_layers`).
        num_heads: H (`num_attention_heads`).
        num_kv_heads: K (`num_key_value_heads`); H must be a multiple of it.
        head_dim: d.
        d_ff: width of the gated MLP (`intermediate_size`).
        rope_theta: base of the rotary frequencies.
        norm_eps: RMSNorm epsilon (`rms_norm_eps`).
        tie_embeddings: the output head is the embedding (`tie_word_embeddings`).
        qkv_bias: biases on the query, key and value projections.
        dtype: compute dtype; parameters and reductions stay float32.
        remat: recompute each layer's activations in the backward pass.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = True
    dtype: str = "float32"
    remat: bool = False


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """Root-mean-square normalisation (arXiv 1910.07467), reduced in float32."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = jnp.expand_dims(scale.astype(x.dtype), tuple(range(x.ndim - 1)))
    return (x32 * inverse).astype(x.dtype) * scale


def rotary(positions: Int[Array, "B T"], head_dim: int, theta: float) -> tuple[Float[Array, "B T 1 d"], Float[Array, "B T 1 d"]]:
    """Cosine and sine of the rotary angles (arXiv 2104.09864), halves laid out as in Hugging Face checkpoints."""
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N d"], rope: tuple[Array, Array]) -> Float[Array, "B T N d"]:
    cos, sin = (r.astype(x.dtype) for r in rope)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def packed_attention(q, k, v, mask: Array) -> Float[Array, "B T Hd"]:
    """Attention among the tokens of packed rows. q [B T H d], k and v [B T K d], mask [B T T] (query, key), causal.

    Queries go in blocks that look at earlier keys only, which skips most of what a causal mask would throw away. With heads
    ahead of tokens both products are plain matrix products, three times faster on a CPU than the same einsum.
    """
    b, t, h, d = q.shape
    repeats = h // k.shape[2]
    q = q.transpose(0, 2, 1, 3) * d**-0.5
    k = jnp.repeat(k, repeats, axis=2).transpose(0, 2, 3, 1)
    v = jnp.repeat(v, repeats, axis=2).transpose(0, 2, 1, 3)
    blocks = []
    for start in range(0, t, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, t)
        scores = jnp.matmul(q[:, :, start:end], k[..., :end], preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, start:end, :end], scores, -1e30)
        exponent = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        weighted = jnp.matmul(exponent.astype(v.dtype), v[:, :, :end], preferred_element_type=jnp.float32)
        blocks.append((weighted / exponent.sum(axis=-1, keepdims=True)).astype(v.dtype))
    return jnp.concatenate(blocks, axis=2).transpose(0, 2, 1, 3).reshape(b, t, h * d)


def cached_attention(q, keys, values, mask: Array) -> Float[Array, "S T Hd"]:
    """Attention of new tokens over a cache. q [S T H d], keys [S K d C], values [S K C d], mask [S T C]."""
    s, t, h, d = q.shape
    kv = keys.shape[1]
    q = q.reshape(s, t, kv, h // kv, d).transpose(0, 2, 3, 1, 4).reshape(s, kv, h // kv * t, d) * d**-0.5
    scores = jnp.matmul(q, keys.astype(q.dtype), preferred_element_type=jnp.float32).reshape(s, kv, h // kv, t, -1)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1).astype(q.dtype)
    out = jnp.matmul(weights.reshape(s, kv, h // kv * t, -1), values.astype(q.dtype))
    return out.reshape(s, kv, h // kv, t, d).transpose(0, 3, 1, 2, 4).reshape(s, t, h * d)


class Block(nnx.Module):
    """One pre-norm transformer block: grouped-query attention, then a SwiGLU MLP.

    The residual stream is a matrix [tokens, D]: XLA:CPU runs the backward pass of a matrix product twice as fast as that of
    the same product with a batch axis.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config

        def weight(rows, columns):
            return nnx.Param(rows**-0.5 * jax.random.normal(rngs.params(), (rows, columns), jnp.float32))

        def silent(rows, columns):
            """The projections that write to the residual stream start at zero: an untrained block is the identity."""
            return nnx.Param(jnp.zeros((rows, columns), jnp.float32))

        self.q_proj = weight(c.d_model, c.num_heads * c.head_dim)
        self.k_proj = weight(c.d_model, c.num_kv_heads * c.head_dim)
        self.v_proj = weight(c.d_model, c.num_kv_heads * c.head_dim)
        self.o_proj = silent(c.num_heads * c.head_dim, c.d_model)
        if c.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((c.num_heads * c.head_dim,), jnp.float32))
            self.k_bias = nnx.Param(jnp.zeros((c.num_kv_heads * c.head_dim,), jnp.float32))
            self.v_bias = nnx.Param(jnp.zeros((c.num_kv_heads * c.head_dim,), jnp.float32))
        self.gate_proj = weight(c.d_model, c.d_ff)
        self.up_proj = weight(c.d_model, c.d_ff)
        self.down_proj = silent(c.d_ff, c.d_model)
        self.input_norm = nnx.Param(jnp.ones((c.d_model,), jnp.float32))
        self.post_attention_norm = nnx.Param(jnp.ones((c.d_model,), jnp.float32))

    def qkv(self, x: Float[Array, "N D"], rope) -> tuple[Array, Array, Array]:
        """Rotated queries [B T H d], rotated keys and values [B T K d] of the N = B * T tokens of `rope`'s shape."""
        c = self.config
        shape = rope[0].shape[:2]
        x = rms_norm(x, self.input_norm[...], c.norm_eps)
        q, k, v = (x @ p[...].astype(x.dtype) for p in (self.q_proj, self.k_proj, self.v_proj))
        if c.qkv_bias:
            q, k, v = (
                y + bias[...].astype(x.dtype)[None]
                for y, bias in zip((q, k, v), (self.q_bias, self.k_bias, self.v_bias), strict=True)
            )
        q, k, v = (y.reshape(*shape, -1, c.head_dim) for y in (q, k, v))
        return rotate(q, rope), rotate(k, rope), v

    def output(self, x: Float[Array, "N D"], attended: Float[Array, "B T Hd"]) -> Float[Array, "N D"]:
        """Adds the attention output and the MLP to the residual stream."""
        c = self.config
        x = x + attended.reshape(x.shape[0], -1) @ self.o_proj[...].astype(x.dtype)
        y = rms_norm(x, self.post_attention_norm[...], c.norm_eps)
        gated = jax.nn.silu(y @ self.gate_proj[...].astype(x.dtype)) * (y @ self.up_proj[...].astype(x.dtype))
        return x + gated @ self.down_proj[...].astype(x.dtype)


class Decoder(nnx.Module):
    """Token ids to final hidden states; the caller applies the output head (`output_embedding`) where it needs logits."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config

        def table():
            scale = config.d_model**-0.5
            return nnx.Param(scale * jax.random.normal(rngs.params(), (config.vocab_size, config.d_model), jnp.float32))

        self.embedding = table()
        self.layers = nnx.vmap(lambda r: Block(config, rngs=r), in_axes=0, out_axes=0)(rngs.split(config.num_layers))
        self.final_norm = nnx.Param(jnp.ones((config.d_model,), jnp.float32))
        if not config.tie_embeddings:
            self.lm_head = table()

    def output_embedding(self) -> Float[Array, "V D"]:
        return (self.embedding if self.config.tie_embeddings else self.lm_head)[...]

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Hidden states of packed rows.

        Args:
            tokens: token ids.
            positions: position of each token inside its own segment, from 0.
            segment_ids: segment of each token, from 1; 0 marks padding. A token attends to the earlier tokens of its segment.
        """
        c = self.config
        causal = jnp.tri(tokens.shape[1], dtype=bool)[None]
        mask = causal & (segment_ids[:, :, None] == segment_ids[:, None, :])
        rope = rotary(positions, c.head_dim, c.rope_theta)
        graph, stacked = nnx.split(self.layers)

        def layer(x, weights):
            with jax.named_scope("block"):
                block = nnx.merge(graph, weights)
                q, k, v = block.qkv(x, rope)
                return block.output(x, packed_attention(q, k, v, mask)), None

        if c.remat:
            layer = jax.checkpoint(layer)
        x = self.embedding[...][tokens.ravel()].astype(c.dtype)
        x, _ = jax.lax.scan(layer, x, stacked, unroll=c.num_layers if c.num_layers <= _UNROLL_LAYERS else 1)
        return rms_norm(x, self.final_norm[...], c.norm_eps).reshape(*tokens.shape, -1)

    def extend(
        self,
        layers: list["Block"],
        cache: tuple[LayerCache, ...],
        tokens: Int[Array, "R T"],
        lengths: Int[Array, " R"],
        counts: Int[Array, " R"],
        slots: Int[Array, " R"] | None = None,
    ) -> tuple[Float[Array, "R T D"], tuple[LayerCache, ...]]:
        """Appends `counts[r]` of the `tokens[r]` to slot r, or to slot `slots[r]`, whose cache holds `lengths[r]` tokens already.

        A row whose slot is past the last one is padding. Returns the hidden states of the new tokens (garbage past `counts`)
        and the cache; nothing is written past `counts`.
        """
        c = self.config
        offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = lengths[:, None] + offsets
        capacity = cache[0][0].shape[-1]
        # An index past the end is dropped by the scatter: that is how padding stays out of the cache.
        write = jnp.where(offsets < counts[:, None], positions, capacity)
        rows = (jnp.arange(tokens.shape[0], dtype=jnp.int32) if slots is None else slots)[:, None]
        mask = jnp.arange(capacity, dtype=jnp.int32)[None, None] <= positions[:, :, None]
        rope = rotary(positions, c.head_dim, c.rope_theta)
        x = self.embedding[...][tokens.ravel()].astype(c.dtype)
        grown = []
        for block, layer in zip(layers, cache, strict=True):
            with jax.named_scope("block"):
                q, k, v = block.qkv(x, rope)
                layer = kv_cache.append(layer, rows, write, k, v)
                x = block.output(x, cached_attention(q, *kv_cache.read(layer, slots, x.dtype), mask))
                grown.append(layer)
        return rms_norm(x, self.final_norm[...], c.norm_eps).reshape(*tokens.shape, -1), tuple(grown)

    def unstacked_layers(self) -> list["Block"]:
        """The blocks one by one. Slicing them once outside a decode loop keeps the copies out of the loop."""
        graph, stacked = nnx.split(self.layers)
        return [nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], stacked)) for i in range(self.config.num_layers)]


def init_params(config: DecoderConfig, key: Array) -> Params:
    """Fresh parameters as a nested dict of float32 arrays; arrays under `layers` have a leading axis L."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key)), nnx.Param))


@functools.cache
def _skeleton(config: DecoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0))), nnx.Param)


def decoder_config(model, vocab_size: int) -> DecoderConfig:
    """The `model` section of a run's config as a `DecoderConfig`; the tokenizer has the last word on the vocabulary."""
    fields = {field.name: model[field.name] for field in dataclasses.fields(DecoderConfig) if field.name != "vocab_size"}
    return DecoderConfig(vocab_size=vocab_size, **fields)


def bind(config: DecoderConfig, params: Params) -> Decoder:
    """The `Decoder` module over `params`; cheap, meant to be called inside a traced function."""
    graph, abstract = _skeleton(config)
    state = jax.tree.map(lambda a: a, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
