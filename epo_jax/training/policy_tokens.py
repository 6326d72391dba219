"""What the decoder gives at the policy tokens of a batch: log-probability, entropy, divergence.

On a mesh, every device computes the head for its own tokens (`mesh.locally`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epo_jax.models.decoder import DecoderConfig, Params, bind
from epo_jax.objectives.batch import TokenBatch
from epo_jax.objectives.head import fused_full_kl, fused_log_prob_entropy
from epo_jax.parallel import mesh


def policy_statistics(
    model: DecoderConfig, params: Params, rows: TokenBatch, temperature: float, top_p: float | None = None
) -> tuple[Float[Array, "R P"], Float[Array, "R P"]]:
    """Log-probability of every policy token and entropy of its distribution (of its nucleus with `top_p`), nats."""
    return head_statistics(model, *head_inputs(model, params, rows), rows.label, temperature, top_p)


def head_inputs(model: DecoderConfig, params: Params, rows: TokenBatch) -> tuple[Float[Array, "N D"], Float[Array, "V D"]]:
    """The hidden states that predict the policy tokens, rows flattened (N = R * P), and the output embedding."""
    module = bind(model, params)
    hidden = module(rows.tokens, rows.positions, rows.segment_ids)
    chosen = jnp.take_along_axis(hidden, rows.index[..., None], axis=1)
    head = mesh.at_use(module.output_embedding(), "vocab", "embed")
    return mesh.constrain(chosen.reshape(-1, chosen.shape[-1]), "tokens"), head


@jax.named_scope("head")
def head_statistics(
    model: DecoderConfig,
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    label: Int[Array, "R P"],
    temperature: float,
    top_p: float | None,
) -> tuple[Float[Array, "R P"], Float[Array, "R P"]]:
    """`fused_log_prob_entropy` of each device's own tokens, in the type of `hidden`.

    Gradients of the head are added up over devices once, not chunk by chunk, and in the head's own type: it comes in float32
    and is rounded here, where each device is alone.
    """

    def own(hidden, head, label):
        head = head.astype(hidden.dtype)
        return fused_log_prob_entropy(hidden, head, label, temperature, top_p=top_p, unused=model.unused_ids)

    flat = mesh.locally(own, (("tokens",), (), ("tokens",)), ("tokens",), mesh.ROWS)(hidden, head, label.ravel())
    return tuple(x.reshape(label.shape) for x in flat)


@jax.named_scope("full_kl")
def head_divergence(
    model: DecoderConfig,
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    ref_hidden: Float[Array, "N D"],
    ref_head: Float[Array, "V D"],
    temperature: float,
) -> Float[Array, " N"]:
    """`fused_full_kl` of each device's own tokens; heads as in `head_statistics`."""

    def own(hidden, head, ref_hidden, ref_head):
        head, ref_head = head.astype(hidden.dtype), ref_head.astype(ref_hidden.dtype)
        return fused_full_kl(hidden, head, ref_hidden, ref_head, temperature, unused=model.unused_ids)

    axes = ("tokens",), (), ("tokens",), ()
    return mesh.locally(own, axes, ("tokens",), mesh.ROWS)(hidden, head, ref_hidden, ref_head)
