"""`generate`, mapped over the members of a sweep (leading axis M).

Every argument and result has that axis, except `Members.shared`, the sampling and the stop tokens. With adapters the members
share the base, which is stored once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from epo_jax.models import generate, lora
from epo_jax.models.decoder import DecoderConfig, Params
from epo_jax.models.generate import Cache, Generated, Sampling


class Members(NamedTuple):
    """The parameters of M policies.

    `shared` is the base if there are adapters, else empty; `own` has arrays [M, ...].
    """

    shared: Params
    own: Params

    @property
    def count(self) -> int:  # type: ignore[override]  # hides tuple.count
        return jax.tree.leaves(self.own)[0].shape[0]


def init_cache(config: DecoderConfig, members: int, slots: int, capacity: int, dtype: str | None = None) -> Cache:
    """An empty cache for `slots` episodes of each member."""
    one = jax.eval_shape(lambda: generate.init_cache(config, slots, capacity, dtype))
    return jax.tree.map(lambda x: jnp.zeros((members, *x.shape), x.dtype), one)


@functools.partial(jax.jit, static_argnames=("capacity",))
def take_slots(cache: Cache, slots: Int[Array, "M R"], capacity: int) -> Cache:
    """See `generate.take_slots`; each member numbers its slots from 0."""
    return jax.vmap(functools.partial(generate.take_slots, capacity=capacity))(cache, slots)


@functools.partial(jax.jit, static_argnames=("columns",), donate_argnames=("cache",))
def copy_slots(cache: Cache, source: Int[Array, "M R"], target: Int[Array, "M R"], columns: int) -> Cache:
    """See `generate.copy_slots`."""
    return jax.vmap(functools.partial(generate.copy_slots, columns=columns))(cache, source, target)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def extend(
    config: DecoderConfig,
    params: Members,
    cache: Cache,
    tokens: Int[Array, "M R n"],
    counts: Int[Array, "M R"],
    fresh: Bool[Array, "M R"],
    slots: Int[Array, "M R"] | None = None,
) -> Cache:
    """See `generate.extend`."""

    def one(own, *given):
        return generate.extend(config, lora.join(params.shared, own), *given)

    return jax.vmap(one)(params.own, cache, tokens, counts, fresh, slots)


@functools.partial(jax.jit, static_argnames=("config", "block"), donate_argnames=("cache",))
def decode(
    config: DecoderConfig,
    params: Members,
    cache: Cache,
    key: Key[Array, " M"],
    episode: Int[Array, "M S"],
    turn: Int[Array, "M S"],
    position: Int[Array, "M S"],
    budget: Int[Array, "M S"],
    sampling: Sampling,
    stop_tokens: Int[Array, " K"],
    block: int,
) -> tuple[Cache, Generated]:
    """See `generate.decode`; it ends when every slot of every member has ended."""

    def one(own, *given):
        return generate.decode(config, lora.join(params.shared, own), *given, sampling, stop_tokens, block, mapped_over="member")

    return jax.vmap(one, axis_name="member")(params.own, cache, key, episode, turn, position, budget)
