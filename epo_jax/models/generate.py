"""Sampling with a key/value cache that lives across turns: `extend` appends given tokens, `decode` samples new ones.

Both are pure functions of (params, cache, ...) with static shapes. A slot is a row of the cache that holds one episode; slots
have their own lengths, temperatures and budgets, all traced, so one program serves every turn of every episode.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from epo_jax.models.decoder import DecoderConfig, LayerCache, Params, bind


class Cache(NamedTuple):
    """Keys and values of every slot, how many tokens each slot holds, and the hidden state of its last token."""

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, " S"]
    hidden: Float[Array, "S D"]


class Generated(NamedTuple):
    """What `decode` sampled; columns at or past `counts` are zero.

    Attributes:
        tokens: sampled ids, a stop token included.
        log_prob: log-probability of each under the distribution it was sampled from (after the temperature), nats.
        entropy: entropy of that distribution, nats.
        counts: number of tokens sampled in each slot.
    """

    tokens: Int[Array, "S n"]
    log_prob: Float[Array, "S n"]
    entropy: Float[Array, "S n"]
    counts: Int[Array, " S"]


def init_cache(config: DecoderConfig, slots: int, capacity: int) -> Cache:
    """An empty cache for `slots` episodes of at most `capacity` tokens.

    Keys are laid out [slot, head, width, position] and values [slot, head, position, width], the orders in which a decode
    step reads them; on a CPU this is two to five times faster than one common order.
    """
    kv, d = config.num_kv_heads, config.head_dim
    dtype = jnp.dtype(config.dtype)

    def layer():
        return jnp.zeros((slots, kv, d, capacity), dtype), jnp.zeros((slots, kv, capacity, d), dtype)

    return Cache(
        layers=tuple(layer() for _ in range(config.num_layers)),
        lengths=jnp.zeros((slots,), jnp.int32),
        hidden=jnp.zeros((slots, config.d_model), dtype),
    )


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def extend(
    config: DecoderConfig,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "S n"],
    counts: Int[Array, " S"],
    fresh: Bool[Array, " S"],
) -> Cache:
    """Appends the first `counts[s]` of `tokens[s]` to slot s; `fresh` slots are emptied first."""
    model = bind(config, params)
    lengths = jnp.where(fresh, 0, cache.lengths)
    hidden, layers = model.extend(model.unstacked_layers(), cache.layers, tokens, lengths, counts)
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return Cache(layers, lengths + counts, jnp.where(counts[:, None] > 0, last, cache.hidden))


def sample(
    keys: Key[Array, " S"], logits: Float[Array, "S V"], temperature: Float[Array, " S"]
) -> tuple[Int[Array, " S"], Float[Array, " S"], Float[Array, " S"]]:
    """A token for each row with its log-probability and the distribution's entropy, in nats, float32.

    Temperature 0 takes the most probable token; log-probability and entropy are then those of temperature 1.
    """
    greedy = temperature <= 0
    scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1.0, temperature)[:, None]
    log_probs = jax.nn.log_softmax(scaled, axis=-1)
    sampled = jax.vmap(jax.random.categorical)(keys, scaled)
    tokens = jnp.where(greedy, jnp.argmax(scaled, axis=-1), sampled).astype(jnp.int32)
    log_prob = jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]
    # A probability that underflowed contributes 0, not 0 * -inf.
    probs = jnp.exp(log_probs)
    entropy = -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1)
    return tokens, log_prob, entropy


@functools.partial(jax.jit, static_argnames=("config", "block"), donate_argnames=("cache",))
def decode(
    config: DecoderConfig,
    params: Params,
    cache: Cache,
    key: Key[Array, ""],
    episode: Int[Array, " S"],
    turn: Int[Array, " S"],
    budget: Int[Array, " S"],
    temperature: Float[Array, " S"],
    stop_token: Int[Array, ""],
    block: int,
) -> tuple[Cache, Generated]:
    """Samples one turn in every slot with a positive `budget`, until its stop token or its budget of tokens.

    The key of a token is fold_in(fold_in(fold_in(key, episode), turn), position): a trajectory depends on its episode and the
    parameters, not on which slot holds it nor on what the other slots do.

    Args:
        budget: most tokens to sample in each slot; 0 leaves the slot alone. At most `block`.
        block: static width of the result.
    """
    model = bind(config, params)
    layers = model.unstacked_layers()
    head = model.output_embedding().astype(config.dtype)
    row_keys = jax.vmap(lambda e, t: jax.random.fold_in(jax.random.fold_in(key, e), t))(episode, turn)
    slots = budget.shape[0]

    def unfinished(carry):
        return jnp.any(carry[0])

    def step(carry):
        live, position, cache, out = carry
        with jax.named_scope("sample"):
            logits = (head @ cache.hidden.T).T  # this orientation streams the [V, D] table once, as it is stored
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, position)
            token, log_prob, entropy = sample(keys, logits, temperature)
        out = Generated(
            tokens=out.tokens.at[:, position].set(jnp.where(live, token, 0)),
            log_prob=out.log_prob.at[:, position].set(jnp.where(live, log_prob, 0.0)),
            entropy=out.entropy.at[:, position].set(jnp.where(live, entropy, 0.0)),
            counts=out.counts + live,
        )
        hidden, grown = model.extend(layers, cache.layers, token[:, None], cache.lengths, live.astype(jnp.int32))
        cache = Cache(grown, cache.lengths + live, jnp.where(live[:, None], hidden[:, 0], cache.hidden))
        live = live & (token != stop_token) & (position + 1 < budget)
        return live, position + 1, cache, out

    out = Generated(
        tokens=jnp.zeros((slots, block), jnp.int32),
        log_prob=jnp.zeros((slots, block), jnp.float32),
        entropy=jnp.zeros((slots, block), jnp.float32),
        counts=jnp.zeros((slots,), jnp.int32),
    )
    _, _, cache, out = jax.lax.while_loop(unfinished, step, (budget > 0, jnp.int32(0), cache, out))
    return cache, out
