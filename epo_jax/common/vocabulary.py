"""Unused token ids: rows of the embedding that the tokenizer does not define.

Embeddings are padded to a round number of rows (Qwen2.5: 151,936 rows for 151,665 tokens). The padding decodes to no text, yet an
entropy bonus would reward sampling it. Sampler and learner therefore both give these ids probability zero.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Ranges [first, end) of ids.
IdRanges = tuple[tuple[int, int], ...]


def unused_ids(defined: Iterable[int], size: int) -> IdRanges:
    """Returns the ids below `size` that are not `defined`: {0, 1, 4} of 8 gives ((2, 4), (5, 8))."""
    ranges, first = [], 0
    for token in sorted({*map(int, defined), size}):
        if first < token:
            ranges.append((first, token))
        first = token + 1
    return tuple(ranges)


def mask_unused(logits: Float[Array, "..."], unused: IdRanges, axis: int, value: float = -jnp.inf) -> Float[Array, "..."]:
    """Sets `logits` to `value` at the `unused` ids along `axis`.

    The mask is computed from an iota, so each device masks its own shard of the vocabulary.
    """
    if not unused:
        return logits
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    masked = functools.reduce(jnp.logical_or, ((ids >= first) & (ids < end) for first, end in unused))
    return jnp.where(masked, jnp.asarray(value, logits.dtype), logits)
