"""Sampling with a key/value cache that persists across turns.

`extend` appends given tokens, `decode` samples new ones. Both are pure functions of (params, cache, ...) with static shapes,
and can be mapped over a leading axis of params and cache. A slot is a row of the cache that holds one episode. Its length,
temperature, truncation and budget are traced, so that one program serves every turn of every episode. Frequent callers pass
unstacked parameters (`decoder.unstack`), which are read layer by layer.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from epo_jax.common.vocabulary import mask_unused
from epo_jax.models import kv_cache
from epo_jax.models.decoder import DecoderConfig, Params, bind, unstack
from epo_jax.models.kv_cache import LayerCache

# Tokens per block in the cumulative sum by which a token is drawn.
_SUM_BLOCK = 64

# Temperatures are clipped to these: at the lowest only the likeliest token is sampled, at the highest all tokens equally.
_COLDEST, _HOTTEST = 1e-30, 1e30


class Cache(NamedTuple):
    """Keys and values of every slot.

    `lengths` are the numbers of tokens, `hidden` the hidden states of the last tokens.
    """

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, " S"]
    hidden: Float[Array, "S D"]


def cache_axes(cache: Cache) -> Cache:
    """The logical axes of each array of a cache."""
    layers = tuple(kv_cache.AXES[: len(layer)] for layer in cache.layers)
    return Cache(layers, lengths=("slots",), hidden=("slots", "hidden"))


class Sampling(NamedTuple):
    """The distribution that each slot samples from.

    It is softmax(logits / temperature), truncated to the `top_k` likeliest tokens and then to the fewest of them with a mass of
    `top_p` (ties with the last one stay), and renormalized.

    Attributes:
        temperature: 0 takes the likeliest token and records the distribution of temperature 1 without truncation.
        top_k: 0 keeps all tokens.
        top_p: 1 keeps all tokens.
    """

    temperature: Float[Array, " S"]
    top_k: Int[Array, " S"]
    top_p: Float[Array, " S"]


class Generated(NamedTuple):
    """The result of `decode`; columns at or past `counts` are zero.

    Attributes:
        tokens: sampled ids, including a stop token.
        log_prob: log-probability of each token under the distribution it was sampled from, nats.
        entropy: entropy of that distribution, nats.
        counts: number of tokens sampled in each slot.
    """

    tokens: Int[Array, "S n"]
    log_prob: Float[Array, "S n"]
    entropy: Float[Array, "S n"]
    counts: Int[Array, " S"]


def init_cache(config: DecoderConfig, slots: int, capacity: int, dtype: str | None = None) -> Cache:
    """An empty cache for `slots` episodes of at most `capacity` tokens.

    It has the compute dtype, or `dtype` ("int8").
    """
    shape = slots, config.num_kv_heads, config.head_dim, capacity
    return Cache(
        layers=tuple(kv_cache.init_layer(*shape, dtype or config.dtype) for _ in range(config.num_layers)),
        lengths=jnp.zeros((slots,), jnp.int32),
        hidden=jnp.zeros((slots, config.d_model), config.dtype),
    )


@functools.partial(jax.jit, static_argnames=("capacity",))
def take_slots(cache: Cache, slots: Int[Array, " R"], capacity: int) -> Cache:
    """A cache of the given slots with room for `capacity` tokens.

    A slot may be given twice.
    """
    layers = tuple(kv_cache.take(layer, slots, capacity) for layer in cache.layers)
    return Cache(layers, cache.lengths[slots], cache.hidden[slots])


@functools.partial(jax.jit, static_argnames=("columns",), donate_argnames=("cache",))
def copy_slots(cache: Cache, source: Int[Array, " R"], target: Int[Array, " R"], columns: int) -> Cache:
    """Copies the first `columns` tokens of slots `source` to `target`.

    The copy is in place. No slot may be both source and target. A target past the last slot is padding.
    """
    layers = tuple(kv_cache.copy(layer, source, target, columns) for layer in cache.layers)
    lengths, hidden = (x.at[target].set(x.at[source].get(mode="clip"), mode="drop") for x in (cache.lengths, cache.hidden))
    return Cache(layers, lengths, hidden)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def extend(
    config: DecoderConfig,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "R n"],
    counts: Int[Array, " R"],
    fresh: Bool[Array, " R"],
    slots: Int[Array, " R"] | None = None,
) -> Cache:
    """Appends the first `counts[r]` of `tokens[r]` to slot `slots[r]`.

    Without `slots` row r is slot r, and R = S. Only the R given rows are computed. The slot of a `fresh` row is emptied
    first. A row with a slot past the last one is padding.
    """
    model = bind(config, unstack(config, params))
    known = cache.lengths if slots is None else cache.lengths.at[slots].get(mode="clip")
    lengths = jnp.where(fresh, 0, known)
    hidden, layers = model.extend(cache.layers, tokens, lengths, counts, slots)
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    if slots is None:
        return Cache(layers, lengths + counts, jnp.where(counts[:, None] > 0, last, cache.hidden))
    before = cache.hidden.at[slots].get(mode="clip")
    return Cache(
        layers,
        cache.lengths.at[slots].set(lengths + counts, mode="drop"),
        cache.hidden.at[slots].set(jnp.where(counts[:, None] > 0, last, before), mode="drop"),
    )


def sample(
    keys: Key[Array, " S"], logits: Float[Array, "S V"], sampling: Sampling
) -> tuple[Int[Array, " S"], Float[Array, " S"], Float[Array, " S"]]:
    """Samples (token, log-probability, entropy of its distribution) for each row; nats, float32."""
    greedy = sampling.temperature <= 0
    # At an extreme temperature the quotient would overflow, or 1 / temperature would be 0, and the weights NaN.
    scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1.0, jnp.clip(sampling.temperature, _COLDEST, _HOTTEST))[:, None]
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    whole = greedy | ((sampling.top_k <= 0) & (sampling.top_p >= 1.0))
    # Without truncation, do not sort the vocabulary for every token.
    scaled = jax.lax.cond(jnp.all(whole), lambda x: x, lambda x: jnp.where(whole[:, None], x, _truncated(x, sampling)), scaled)
    weights = jnp.exp(scaled)
    tokens, total = _drawn(jax.vmap(jax.random.uniform)(keys), weights)
    # Nor search for the likeliest token if no row is greedy.
    likeliest = jax.lax.cond(jnp.any(greedy), lambda x: jnp.argmax(x, axis=-1), lambda x: jnp.zeros(len(x), int), scaled)
    tokens = jnp.where(greedy, likeliest, tokens).astype(jnp.int32)
    log_z = jnp.log(total)
    log_prob = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0] - log_z
    # -sum p log p; a probability of 0 contributes 0, not 0 * -inf.
    entropy = log_z - jnp.sum(weights * jnp.where(weights > 0, scaled, 0.0), axis=-1) / total
    return tokens, log_prob, entropy


def _truncated(scaled: Float[Array, "S V"], sampling: Sampling) -> Float[Array, "S V"]:
    """Logits with -inf outside the support of each row."""
    vocabulary = scaled.shape[-1]
    ordered = jnp.flip(jnp.sort(scaled, axis=-1), axis=-1)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocabulary), vocabulary)
    kth = jnp.take_along_axis(ordered, k[:, None] - 1, axis=-1)
    probs = jax.nn.softmax(jnp.where(ordered >= kth, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = ((before < sampling.top_p[:, None]) | (sampling.top_p >= 1.0)[:, None]) & (ordered >= kth)
    kept = kept.at[:, 0].set(True)  # even if top_p rounds to 0 in float32
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= least, scaled, -jnp.inf)


def _drawn(uniform: Float[Array, " S"], weights: Float[Array, "S V"]) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """Draws a token in proportion to its weight by inverting the cumulative sum; also returns the sum of the weights.

    `uniform` is one number in [0, 1) for each row: the Gumbel trick needs one for every token, which on a CPU costs as much as
    the forward pass of a small model. The sum goes over blocks, so that only one block is searched token by token.

    A token of weight 0 is never drawn. Because of rounding this takes more than a comparison: a parallel cumulative sum is not
    monotone and may rise where a block has no weight, and the sum of a block may exceed the running sum of its tokens.
    """
    slots, vocabulary = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocabulary % _SUM_BLOCK))).reshape(slots, -1, _SUM_BLOCK)
    sums = blocks.sum(axis=-1)
    upto = jnp.cumsum(sums, axis=-1)
    total = upto[:, -1]
    threshold = (uniform * total)[:, None]
    block = _first_or_last((upto > threshold) & (sums > 0), sums > 0)[:, None]
    words = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    before = jnp.where(block > 0, jnp.take_along_axis(upto, jnp.maximum(block - 1, 0), axis=-1), 0.0)
    word = _first_or_last((before + jnp.cumsum(words, axis=-1) > threshold) & (words > 0), words > 0)
    return block[:, 0] * _SUM_BLOCK + word, total


def _first_or_last(reached: Bool[Array, "S n"], allowed: Bool[Array, "S n"]) -> Int[Array, " S"]:
    """The first column of each row that is `reached`, or if there is none, the last that is `allowed`."""
    last = allowed.shape[-1] - 1 - jnp.argmax(allowed[:, ::-1], axis=-1)
    return jnp.where(reached.any(axis=-1), jnp.argmax(reached, axis=-1), last)


@functools.partial(jax.jit, static_argnames=("config", "block", "mapped_over"), donate_argnames=("cache",))
def decode(
    config: DecoderConfig,
    params: Params,
    cache: Cache,
    key: Key[Array, ""],
    episode: Int[Array, " S"],
    turn: Int[Array, " S"],
    position: Int[Array, " S"],
    budget: Int[Array, " S"],
    sampling: Sampling,
    stop_tokens: Int[Array, " K"],
    block: int,
    mapped_over: str | None = None,
) -> tuple[Cache, Generated]:
    """Samples up to `block` tokens in every slot.

    A slot ends at a stop token or its budget. The last sampled token of a slot is not appended to the cache: it goes in front
    of the tokens of the next `extend`, where it costs nothing. The key of a token is fold_in(fold_in(fold_in(key, episode),
    turn), position), so a trajectory depends on its episode and the parameters, and not on its slot, on the other slots, or
    on the split of a turn into blocks.

    Args:
        position: number of tokens that earlier blocks of the turn have sampled.
        budget: the most tokens to sample in each slot from here on; 0 leaves the slot unchanged.
        stop_tokens: each of them ends a turn; ids that no token has, such as -1, are allowed.
        block: static width of the result.
        mapped_over: name of the axis that `vmap` maps over. The loop then ends for all members at once; otherwise every step
            would copy the whole cache to preserve that of finished members.
    """
    model = bind(config, unstack(config, params))
    head = model.output_embedding()
    row_keys = jax.vmap(lambda e, t: jax.random.fold_in(jax.random.fold_in(key, e), t))(episode, turn)
    slots = budget.shape[0]

    def draw(live, i, cache, out):
        """Samples token i of the live slots: (slots that continue, tokens, out)."""
        with jax.named_scope("head"):
            # This orientation reads the [V, D] table once, in its own layout.
            logits = jnp.matmul(head, cache.hidden.T, preferred_element_type=jnp.float32).T
            logits = mask_unused(logits, config.unused_ids, axis=1)
        with jax.named_scope("sample"):
            keys = jax.vmap(jax.random.fold_in)(row_keys, position + i)
            token, log_prob, entropy = sample(keys, logits, sampling)
        out = Generated(
            tokens=out.tokens.at[:, i].set(jnp.where(live, token, 0)),
            log_prob=out.log_prob.at[:, i].set(jnp.where(live, log_prob, 0.0)),
            entropy=out.entropy.at[:, i].set(jnp.where(live, entropy, 0.0)),
            counts=out.counts + live,
        )
        stopped = jnp.any(token[:, None] == stop_tokens[None], axis=1)
        return live & ~stopped & (i + 1 < budget), token, out

    def unfinished(carry):
        live, _, i, _, _ = carry
        more = jnp.any(live)
        if mapped_over is not None:
            more = jax.lax.pmax(more.astype(jnp.int32), mapped_over) > 0
        return more & (i < block)

    def step(carry):
        live, token, i, cache, out = carry
        hidden, grown = model.extend(cache.layers, token[:, None], cache.lengths, live.astype(jnp.int32))
        cache = Cache(grown, cache.lengths + live, jnp.where(live[:, None], hidden[:, 0], cache.hidden))
        live, token, out = draw(live, i, cache, out)
        return live, token, i + 1, cache, out

    out = Generated(
        tokens=jnp.zeros((slots, block), jnp.int32),
        log_prob=jnp.zeros((slots, block), jnp.float32),
        entropy=jnp.zeros((slots, block), jnp.float32),
        counts=jnp.zeros((slots,), jnp.int32),
    )
    live, token, out = draw(budget > 0, jnp.int32(0), cache, out)
    *_, cache, out = jax.lax.while_loop(unfinished, step, (live, token, jnp.int32(1), cache, out))
    return cache, out
