"""The critic's loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from epo_jax.objectives.spec import Scalar


class ValueLoss(NamedTuple):
    """Per-token value loss and, per token, 1 where the clip decides it; both [B, T]."""

    loss: Float[Array, "B T"]
    clipped: Float[Array, "B T"]


def value_loss(
    value: Float[Array, "B T"], old_value: Float[Array, "B T"], returns: Float[Array, "B T"], clip: Scalar = 0.5
) -> ValueLoss:
    """The larger of the squared errors of the value and of the value kept within `clip` of the old one.

    Aggregate with `policy.token_weights`.
    """
    kept = jax.lax.stop_gradient(jnp.clip(value, old_value - clip, old_value + clip))
    plain, clipped = jnp.square(value - returns), jnp.square(kept - returns)
    return ValueLoss(jnp.where(clipped > plain, clipped, plain), (clipped > plain).astype(jnp.float32))
