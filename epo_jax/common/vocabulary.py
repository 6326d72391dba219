"""Ids that a model has rows for and its tokenizer does not define.

Embeddings are padded to a round number of rows (Qwen2.5: 151,936 rows for 151,665 tokens). A policy that may emit the rest
says nothing with it, and an entropy bonus pays for it. The sampler and the learner both give these ids probability zero.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Ranges [first, end) of ids.
IdRanges = tuple[tuple[int, int], ...]


def unused_ids(defined: Iterable[int], size: int) -> IdRanges:
    """The ids below `size` that are not `defined`: {0, 1, 4} of 8 leaves ((2, 4), (5, 8))."""
    ranges, first = [], 0
    for token in sorted({*map(int, defined), size}):
        if first < token:
            ranges.append((first, token))
        first = token + 1
    return tuple(ranges)


def mask_unused(logits: Float[Array, "..."], unused: IdRanges, axis: int, value: float = -jnp.inf) -> Float[Array, "..."]:
    """`logits` with `value` at the `unused` ids, which run along `axis`.

    No table is built: with the vocabulary sharded, each device masks its own rows.
    """
    if not unused:
        return logits
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    masked = functools.reduce(jnp.logical_or, ((ids >= first) & (ids < end) for first, end in unused))
    return jnp.where(masked, jnp.asarray(value, logits.dtype), logits)
