"""Random streams: one seed for a run, and an independent stream for each purpose.

A purpose is a name, such as "rollout". Streams with different purposes or seeds are independent, unlike sums of seed and offset.
"""

import zlib

import jax
import numpy as np
from jaxtyping import Array, Integer, Key


def key(seed: int | Integer[Array, ""], purpose: str) -> Key[Array, ""]:
    """Returns the JAX key for a purpose. The seed may be traced."""
    return jax.random.fold_in(jax.random.key(seed), _number(purpose))


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Returns the NumPy generator for a purpose, one for each value of `indices` (a step, an epoch)."""
    return np.random.default_rng([seed, _number(purpose), *indices])


def _number(purpose: str) -> int:
    return zlib.crc32(purpose.encode())
