"""The critic: a decoder of its own and one linear output, the expected return from each hidden state."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epo_jax.models.decoder import DecoderConfig, Params, bind


def init_critic(decoder: Params) -> Params:
    """A critic that starts from a copy of the policy's decoder and predicts 0 everywhere."""
    width = decoder["final_norm"].shape[0]
    return {"decoder": jax.tree.map(jnp.copy, decoder), "value": jnp.zeros((width,), jnp.float32)}


def values(
    config: DecoderConfig,
    critic: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    index: Int[Array, "B P"],
) -> Float[Array, "B P"]:
    """Value before each policy token, in units of return, float32; `index` as in `TokenBatch`."""
    hidden = bind(config, critic["decoder"])(tokens, positions, segment_ids)
    chosen = jnp.take_along_axis(hidden, index[..., None], axis=1).astype(jnp.float32)
    return chosen @ critic["value"]
