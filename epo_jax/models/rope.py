"""Rotary positions (arXiv 2104.09864) and their scaling to longer contexts.

`rope_type` and the other keys are those of `rope_parameters` in a Hugging Face config; the arithmetic follows
`modeling_rope_utils` of transformers, in float32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# The keys of each type with their defaults; `...` marks a required key.
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": ...},
    "llama3": {
        "factor": ...,
        "low_freq_factor": ...,
        "high_freq_factor": ...,
        "original_max_position_embeddings": ...,
    },
    "yarn": {
        "factor": ...,
        "original_max_position_embeddings": ...,
        "attention_factor": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}


def frequencies(head_dim: int, theta: float, scaling: dict) -> tuple[np.ndarray, float]:
    """(radians per position of each pair, factor on cosine and sine).

    Args:
        scaling: a `rope_type` of SCALINGS and its keys; empty for plain rotary positions.
    """
    plain = 1.0 / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    kind = scaling.get("rope_type", "default")
    values = {key: scaling.get(key, default) for key, default in SCALINGS[kind].items()}
    if kind == "default":
        return plain, 1.0
    stretched = plain / np.float32(values["factor"])
    if kind == "linear":
        return stretched, 1.0
    length = values["original_max_position_embeddings"]
    if kind == "llama3":
        # Long waves are scaled, short ones are not, and those between are interpolated.
        low, high = values["low_freq_factor"], values["high_freq_factor"]
        kept = np.clip((length * plain / (2 * math.pi) - low) / (high - low), 0, 1)
        return ((1 - kept) * stretched + kept * plain).astype(np.float32), 1.0

    # YaRN (arXiv 2309.00071): the same idea, with a ramp between two numbers of rotations in the training length.
    def pair(turns: float) -> float:
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair(values["beta_fast"])), 0)
    last = min(math.ceil(pair(values["beta_slow"])), head_dim - 1)
    kept = 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 0.001), 0, 1)
    factor = values["attention_factor"] or 0.1 * math.log(max(values["factor"], 1.0)) + 1.0
    return ((1 - kept) * stretched + kept * plain).astype(np.float32), factor


@jax.named_scope("rope")
def rotary(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: dict
) -> tuple[Float[Array, "B T 1 d"], Float[Array, "B T 1 d"]]:
    """Cosine and sine of the rotary angles.

    The halves are in the order of Hugging Face checkpoints.
    """
    per_position, factor = frequencies(head_dim, theta, scaling)
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(per_position)[None, None]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rotate(x: Float[Array, "B T N d"], rope: tuple[Array, Array]) -> Float[Array, "B T N d"]:
    """Rotates queries or keys by the angles of `rotary`."""
    cos, sin = (r.astype(x.dtype) for r in rope)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
