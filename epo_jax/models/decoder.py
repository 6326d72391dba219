"""A decoder-only transformer in Flax NNX.

It covers the families Qwen2 (with 2.5), Qwen3 and Llama (with SmolLM2). Read it from top to bottom: configuration, one block,
the stack. The families differ in data only: which projections have biases, whether queries and keys are normalized, how
rotary positions are scaled, which layers attend to a window. The learner (`Decoder.__call__`: packed rows, no cache) and the
sampler (`Decoder.extend`: new tokens appended to a cache) share the block, so the two cannot drift apart.

Axes: B rows, S slots, T tokens, C cache length, D width, H query heads, K key/value heads, d head width, L layers, V vocabulary.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from epo_jax.common.vocabulary import IdRanges
from epo_jax.models import kv_cache
from epo_jax.models.attention import SAVED, cached_attention, packed_attention
from epo_jax.models.kv_cache import LayerCache
from epo_jax.models.rope import rotary, rotate
from epo_jax.parallel import mesh

Params = dict

# Projection of a layer -> the logical axes (epo_jax/parallel/mesh.py) of its input and output.
PROJECTIONS = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}

# What a layer saves for its backward pass, which recomputes the rest. "none" saves everything, each later policy less.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(SAVED)
    ),
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Below this depth the layer loop is unrolled: XLA:CPU then fuses across layers and the program stays small.
_UNROLL_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685).

    Each projection in `targets` adds alpha / rank * x A B to its output.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = tuple(PROJECTIONS)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Static shape of a decoder.

    Names in parentheses are those of a Hugging Face `config.json`.

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
        tie_embeddings: the embedding is also the output head (`tie_word_embeddings`).
        qkv_bias, o_bias, mlp_bias: biases on these projections.
        qk_norm: RMSNorm on each head's queries and keys (Qwen3).
        rope_scaling: items of `rope_parameters` without `rope_theta`, see `rope.SCALINGS`; () is plain rotary positions.
        windows: for each layer, the number of last tokens that a token attends to, itself included; 0 is all. () is 0 everywhere.
        max_positions: the longest sequence that the model was trained on (`max_position_embeddings`).
        unused_ids: ranges [first, end) of ids below V that the tokenizer does not define, for example padding of the embedding
            to a round number of rows. Their probability is 0, in the sampler and in the learner.
        dtype: compute dtype; parameters and reductions are float32.
        remat: what the backward pass recomputes, see `REMAT_POLICIES`.
        lora: adapters of the projections.
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
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_scaling: tuple[tuple[str, str | int | float], ...] = ()
    windows: tuple[int, ...] = ()
    max_positions: int = 32768
    unused_ids: IdRanges = ()
    dtype: str = "float32"
    remat: str = "none"
    lora: Lora | None = None

    def layer_windows(self) -> list[int | None]:
        """The window of each layer; None attends to all tokens."""
        return [window or None for window in self.windows or (0,) * self.num_layers]

    def axis_sizes(self) -> dict[str, int]:
        """The length of each logical axis of the parameters."""
        return {
            "vocab": self.vocab_size,
            "embed": self.d_model,
            "hidden": self.d_model,
            "heads": self.num_heads * self.head_dim,
            "kv_heads": self.num_kv_heads * self.head_dim,
            "head_dim": self.head_dim,
            "mlp": self.d_ff,
            "rank": self.lora.rank if self.lora else 0,
        }

    def projection_sizes(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each projection of a layer."""
        sizes = self.axis_sizes()
        return {name: (sizes[rows], sizes[columns]) for name, (rows, columns) in PROJECTIONS.items()}


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """Root-mean-square normalization (arXiv 1910.07467), reduced in float32."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = jnp.expand_dims(scale.astype(x.dtype), tuple(range(x.ndim - 1)))
    return (x32 * inverse).astype(x.dtype) * scale


class Block(nnx.Module):
    """One pre-norm transformer block: grouped-query attention, then a SwiGLU MLP.

    The residual stream is a matrix [tokens, D]: XLA:CPU runs the backward pass of a matrix product twice as fast as that of
    the same product with a batch axis.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        sizes = c.axis_sizes()

        def normal(rows, columns):
            shape = sizes[rows], sizes[columns]
            return nnx.Param(shape[0] ** -0.5 * jax.random.normal(rngs.params(), shape, jnp.float32), axes=(rows, columns))

        def constant(value, *axes):
            return nnx.Param(jnp.full([sizes[axis] for axis in axes], value, jnp.float32), axes=axes)

        for name, axes in PROJECTIONS.items():
            # Projections that write to the residual stream start at zero, so that an untrained block is the identity.
            setattr(self, name, constant(0.0, *axes) if name in ("o_proj", "down_proj") else normal(*axes))
        biased = "q_proj k_proj v_proj " * c.qkv_bias + "o_proj " * c.o_bias + "gate_proj up_proj down_proj" * c.mlp_bias
        for name in biased.split():
            # A bias of the residual stream is whole on every device.
            columns = PROJECTIONS[name][1]
            setattr(self, _bias(name), constant(0.0, "hidden" if columns == "embed" else columns))
        for name in c.lora.targets if c.lora else ():
            rows, columns = PROJECTIONS[name]
            setattr(self, f"{name}_lora_a", normal(rows, "rank"))
            setattr(self, f"{name}_lora_b", constant(0.0, "rank", columns))
        self.input_norm = constant(1.0, "hidden")
        self.post_attention_norm = constant(1.0, "hidden")
        if c.qk_norm:
            self.q_norm = constant(1.0, "head_dim")
            self.k_norm = constant(1.0, "head_dim")

    def project(self, name: str, x: Float[Array, "N in"]) -> Float[Array, "N out"]:
        """x W + b, plus the output of the projection's adapter."""

        def weight(key):
            param = getattr(self, key)
            return mesh.at_use(param[...].astype(x.dtype), *param.axes)

        y = x @ weight(name)
        if hasattr(self, _bias(name)):
            y = y + weight(_bias(name))[None]
        lora = self.config.lora
        if lora and name in lora.targets:
            y = y + (lora.alpha / lora.rank) * ((x @ weight(f"{name}_lora_a")) @ weight(f"{name}_lora_b"))
        # Devices along "tensor" hold columns of the product, or terms of its sum, which are then reduce-scattered over tokens.
        columns = PROJECTIONS[name][1]
        return mesh.constrain(y, "residual_tokens") if columns == "embed" else mesh.constrain(y, "tokens", columns)

    @jax.named_scope("attention")
    def qkv(self, x: Float[Array, "N D"], rope) -> tuple[Array, Array, Array]:
        """(rotated queries [B T H d], rotated keys, values [B T K d]).

        N = B * T, with the B and T of `rope`.
        """
        c = self.config
        x = mesh.constrain(rms_norm(x, self.input_norm[...], c.norm_eps), "tokens")
        q, k, v = (self.project(name, x).reshape(*rope[0].shape[:2], -1, c.head_dim) for name in ("q_proj", "k_proj", "v_proj"))
        if c.qk_norm:
            q, k = rms_norm(q, self.q_norm[...], c.norm_eps), rms_norm(k, self.k_norm[...], c.norm_eps)
        return rotate(q, rope), rotate(k, rope), v

    @jax.named_scope("attention")
    def attention_output(self, x: Float[Array, "N D"], attended: Float[Array, "B T H d"]) -> Float[Array, "N D"]:
        """Adds the attention output to the residual stream."""
        return x + self.project("o_proj", attended.reshape(x.shape[0], -1))

    @jax.named_scope("mlp")
    def mlp(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """Adds the MLP to the residual stream."""
        y = mesh.constrain(rms_norm(x, self.post_attention_norm[...], self.config.norm_eps), "tokens")
        gated = jax.nn.silu(self.project("gate_proj", y)) * self.project("up_proj", y)
        return x + self.project("down_proj", gated)


def _bias(projection: str) -> str:
    return projection.replace("proj", "bias")


@jax.named_scope("embed")
def embed(table: Float[Array, "V D"], tokens: Int[Array, " N"]) -> Float[Array, "N D"]:
    """The embeddings of tokens.

    On a mesh the table is never gathered. A device looks up the tokens of its `fsdp` group in its shard: those in its rows of the
    vocabulary, in its columns. A reduce-scatter over `tensor` and an all-to-all over `fsdp` then complete each token's embedding
    on the token's own device.
    """
    if not mesh.divides("residual_tokens", tokens.shape[0]):
        return table[tokens]

    def own(table, tokens):
        ids = jax.lax.all_gather(tokens, "fsdp") - jax.lax.axis_index("tensor") * table.shape[0]
        found = table.at[jnp.where(ids < 0, table.shape[0], ids)].get(mode="fill", fill_value=0)
        found = jax.lax.psum_scatter(found, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=2, tiled=True)[0]

    return mesh.locally(own, (("vocab", "embed"), ("tokens",)), ("residual_tokens",))(table, tokens)


class Decoder(nnx.Module):
    """Token ids to final hidden states.

    The caller applies the output head (`output_embedding`). The layers are one block of stacked arrays, over which the
    learner (`__call__`) loops, or a list of blocks, which the sampler (`extend`) reads.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, stacked: bool = True):
        self.config = config

        def table():
            shape = config.vocab_size, config.d_model
            return nnx.Param(shape[1] ** -0.5 * jax.random.normal(rngs.params(), shape, jnp.float32), axes=("vocab", "embed"))

        self.embedding = table()
        if stacked:
            self.layers: Any = nnx.vmap(lambda r: Block(config, rngs=r), in_axes=0, out_axes=0)(rngs.split(config.num_layers))
        else:
            self.layers = nnx.List(Block(config, rngs=rngs) for _ in range(config.num_layers))
        self.final_norm = nnx.Param(jnp.ones((config.d_model,), jnp.float32), axes=("hidden",))
        if not config.tie_embeddings:
            self.lm_head = table()

    def output_embedding(self) -> Float[Array, "V D"]:
        """The output head: a logit is its product with a hidden state."""
        return (self.embedding if self.config.tie_embeddings else self.lm_head)[...]

    def rope(self, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
        c = self.config
        return rotary(positions, c.head_dim, c.rope_theta, dict(c.rope_scaling))

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Hidden states of packed rows.

        Args:
            tokens: token ids.
            positions: position of each token inside its own segment, from 0.
            segment_ids: segment of each token, from 1; 0 is padding. A token attends to itself and earlier tokens of its segment.
        """
        c = self.config
        rope = self.rope(positions)
        graph, stacked = nnx.split(self.layers)
        x = embed(self.embedding[...], tokens.ravel()).astype(c.dtype)
        start = 0
        # One loop per run of layers with the same window; most models have one window or none.
        for window, run in itertools.groupby(c.layer_windows()):
            length = len(list(run))

            def layer(x, weights, window=window):
                with jax.named_scope("block"):
                    block = nnx.merge(graph, weights)
                    q, k, v = block.qkv(x, rope)
                    x = block.attention_output(x, packed_attention(q, k, v, segment_ids, window))
                    return block.mlp(x), None

            if c.remat != "none":
                layer = jax.checkpoint(layer, policy=REMAT_POLICIES[c.remat], prevent_cse=length <= _UNROLL_LAYERS)
            weights = jax.tree.map(lambda a, i=start, n=length: a[i : i + n] if n < c.num_layers else a, stacked)
            x, _ = jax.lax.scan(layer, x, weights, unroll=length if length <= _UNROLL_LAYERS else 1)
            start += length
        return mesh.constrain(rms_norm(x, self.final_norm[...], c.norm_eps), "tokens").reshape(*tokens.shape, -1)

    def extend(
        self,
        cache: tuple[LayerCache, ...],
        tokens: Int[Array, "R T"],
        lengths: Int[Array, " R"],
        counts: Int[Array, " R"],
        slots: Int[Array, " R"] | None = None,
    ) -> tuple[Float[Array, "R T D"], tuple[LayerCache, ...]]:
        """Appends the first `counts[r]` of `tokens[r]` to slot `slots[r]`.

        Without `slots` row r is slot r. The slot holds `lengths[r]` tokens before. A row with a slot past the last one is
        padding. Returns the hidden states of the new tokens (garbage past `counts`) and the cache, in which nothing is
        written past `counts`.
        """
        c = self.config
        offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        positions = lengths[:, None] + offsets
        capacity = cache[0][0].shape[-1]
        # The scatter drops an index past the end, which keeps padding out of the cache.
        write = jnp.where(offsets < counts[:, None], positions, capacity)
        rows = (jnp.arange(tokens.shape[0], dtype=jnp.int32) if slots is None else slots)[:, None]
        ends = jnp.where(offsets < counts[:, None], positions + 1, 0).max(axis=0)
        rope = self.rope(positions)
        x = embed(self.embedding[...], tokens.ravel()).astype(c.dtype)
        grown = []
        for block, layer, window in zip(self.layers, cache, c.layer_windows(), strict=True):
            with jax.named_scope("block"):
                q, k, v = block.qkv(x, rope)
                layer = kv_cache.append(layer, rows, write, k, v)
                attended = cached_attention(q, *kv_cache.read(layer, slots, x.dtype), positions, ends, window)
                x = block.mlp(block.attention_output(x, attended))
                grown.append(layer)
        return rms_norm(x, self.final_norm[...], c.norm_eps).reshape(*tokens.shape, -1), tuple(grown)


def init_params(config: DecoderConfig, key: Array) -> Params:
    """Initial parameters, a nested dict of float32 arrays.

    Arrays in `layers` have a leading axis L.
    """
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key)), nnx.Param))


def param_axes(config: DecoderConfig) -> PyTree[mesh.Axes]:
    """The logical axes of each array of `init_params`."""
    _, abstract = _skeleton(config, stacked=True)
    axes = jax.tree.map(lambda param: param.axes, abstract, is_leaf=lambda x: isinstance(x, nnx.Param))
    axes = nnx.to_pure_dict(axes)
    return axes | {"layers": {name: ("layers", *of_layer) for name, of_layer in axes["layers"].items()}}


@functools.partial(jax.jit, static_argnames=("config",))
def unstack(config: DecoderConfig, params: Params) -> Params:
    """Parameters for sampling: in the compute dtype, layer by layer.

    `layers` becomes a dict from the number of a layer to its arrays.
    A program that slices layers out of a stack copies them at every call. Works on part of the parameters too, and leaves
    unstacked ones unchanged.
    """
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
    layers = params.get("layers", {})
    if layers and 0 not in layers:
        layers = {i: jax.tree.map(lambda x, i=i: x[i], layers) for i in range(config.num_layers)}
        params = params | {"layers": layers}
    return params


@functools.cache
def _skeleton(config: DecoderConfig, stacked: bool) -> tuple[nnx.GraphDef, PyTree[jax.ShapeDtypeStruct]]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0), stacked=stacked)), nnx.Param)


def decoder_config(model) -> DecoderConfig:
    """A `DecoderConfig` from the `model` section of a run's config."""
    return DecoderConfig(**{field.name: model[field.name] for field in dataclasses.fields(DecoderConfig) if field.name in model})


def with_adapters(config: DecoderConfig, model) -> DecoderConfig:
    """`config` with the adapters of the `model` section of a run's config."""
    return dataclasses.replace(config, lora=Lora(model.lora_rank, model.lora_alpha, tuple(model.lora_targets)))


def bind(config: DecoderConfig, params: Params) -> Decoder:
    """The `Decoder` module with `params`; cheap, for use inside a traced function."""
    graph, abstract = _skeleton(config, stacked=0 not in params["layers"])
    state = jax.tree.map(lambda a: a, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
