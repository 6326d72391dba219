"""The randomness of a run: one seed, and a stream of its own for each purpose.

A purpose is a name, such as "rollout". Streams of different purposes, and of different seeds, are independent: no sum of a seed
and an offset can make two of them meet.
"""

import zlib

import jax
import numpy as np
from jaxtyping import Array, Integer, Key


def key(seed: int | Integer[Array, ""], purpose: str) -> Key[Array, ""]:
    """The JAX key of a purpose. The seed may be traced."""
    return jax.random.fold_in(jax.random.key(seed), _number(purpose))


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """The NumPy generator of a purpose on the host; `indices` (a step, an epoch) make one for each of their values."""
    return np.random.default_rng([seed, _number(purpose), *indices])


def _number(purpose: str) -> int:
    return zlib.crc32(purpose.encode())
