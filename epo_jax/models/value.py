"""The critic: the expected return, linear in a decoder's hidden states.

The decoder is separate from the policy ("own"), or the policy's frozen base with separate adapters ("lora"), or the policy
itself, which gets no gradient from the value ("trunk").
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from epo_jax.models import lora
from epo_jax.models.decoder import DecoderConfig, Params, bind
from epo_jax.parallel.mesh import Axes
from epo_jax.settings.table import CriticKind


def init_critic(kind: CriticKind, policy: Params) -> Params:
    """A critic with a copy of its part of the policy.

    It predicts 0 everywhere.
    """
    value = jnp.zeros(policy["final_norm"].shape, jnp.float32)
    return {"decoder": jax.tree.map(jnp.copy, _decoder(kind, policy)), "value": value}


def critic_axes(kind: CriticKind, policy: PyTree[Axes]) -> PyTree[Axes]:
    """The logical axes of `init_critic`, from those of the policy."""
    return {"decoder": _decoder(kind, policy), "value": ("hidden",)}


def _decoder(kind: CriticKind, policy: PyTree) -> PyTree:
    base, adapters = lora.split(policy)
    return {"own": base, "lora": adapters, "trunk": {}}[kind]


@jax.named_scope("critic")
def values(
    kind: CriticKind,
    config: DecoderConfig,
    critic: Params,
    policy: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    index: Int[Array, "B P"],
) -> Float[Array, "B P"]:
    """Value before each policy token, in units of return, float32.

    `config` is that of the policy; `index` is as in `TokenBatch`.
    """
    shared = {"own": {}, "lora": lora.split(policy)[0], "trunk": policy}[kind]
    if kind == "own":
        config = dataclasses.replace(config, lora=None)
    hidden = bind(config, lora.join(jax.lax.stop_gradient(shared), critic["decoder"]))(tokens, positions, segment_ids)
    with jax.named_scope("value"):
        chosen = jnp.take_along_axis(hidden, index[..., None], axis=1).astype(jnp.float32)
        return chosen @ critic["value"]
