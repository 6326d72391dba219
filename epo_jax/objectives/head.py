"""The fused head: log-probability and entropy of policy tokens without ever holding [tokens, V] logits.

The forward pass keeps a few numbers a token; the backward pass recomputes each chunk's logits and uses the closed form

    d logits = ( g_logp * (onehot(label) - p) - g_H * p * (log p + H) ) / temperature

so that peak memory is one chunk's [V, chunk] and not the batch's. Logits are laid out [V, chunk], as
embedding @ hidden.T: on a CPU that orientation is the faster one, and elsewhere it makes no difference.

Nothing here looks words up: the label's logit is a masked sum over the vocabulary. With the embedding's rows sharded, each
device then works on its own words, and only sums of [chunk] and [chunk, D] cross between devices.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from epo_jax.common.vocabulary import IdRanges, mask_unused
from epo_jax.objectives.spec import Scalar


def log_prob_entropy_from_logits(
    logits: Float[Array, "*N V"], labels: Int[Array, "*N"], temperature: Scalar = 1.0, top_p: float | None = None
) -> tuple[Float[Array, "*N"], Float[Array, "*N"]]:
    """Log-probability of `labels` and entropy (nats), float32, of softmax(logits / temperature).

    Words masked with -inf have probability zero and add nothing to the entropy. With `top_p`, the entropy is that of
    the nucleus (see `fused_log_prob_entropy`); the log-probability stays that of the whole distribution.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    log_q = log_p if top_p is None else jax.nn.log_softmax(_nucleus(log_p, top_p, axis=-1), axis=-1)
    entropy = -(jnp.exp(log_q) * jnp.where(jnp.isneginf(log_q), 0.0, log_q)).sum(-1)
    return jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0], entropy


def fused_log_prob_entropy(
    hidden: Float[Array, "N D"],
    embedding: Float[Array, "V D"],
    labels: Int[Array, " N"],
    temperature: Scalar = 1.0,
    chunk: int = 512,
    top_p: float | None = None,
    unused: IdRanges = (),
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Log-probability of `labels` and entropy (nats), float32, of softmax(embedding @ hidden / temperature).

    Tokens are handled `chunk` at a time. Gradients flow to `hidden` and `embedding`; the temperature belongs to the
    sampler and gets none. With `top_p`, the entropy is that of the nucleus: the likeliest words that together hold at
    least `top_p`, renormalized, the set itself being a constant of the gradient (SIREN's first mask). `unused` ids have
    probability zero; a label among them, as padding may be, gets a finite number without meaning.
    """
    num_tokens = labels.shape[0]
    chunks, labels = _split(hidden, chunk), _split(labels, chunk)
    outputs = _head(top_p, unused, chunks, embedding, labels, jnp.asarray(temperature, jnp.float32))
    return tuple(x.T.ravel()[:num_tokens] for x in outputs)


def fused_full_kl(
    hidden: Float[Array, "N D"],
    embedding: Float[Array, "V D"],
    ref_hidden: Float[Array, "N D"],
    ref_embedding: Float[Array, "V D"],
    temperature: Scalar = 1.0,
    chunk: int = 512,
    unused: IdRanges = (),
) -> Float[Array, " N"]:
    """KL(pi || pi_ref) over the whole vocabulary but its `unused` ids, nats per token, in chunks recomputed by the backward
    pass."""

    @jax.checkpoint
    def divergence(pair):
        log_p = jax.nn.log_softmax(mask_unused(_logits(embedding, pair[0], temperature), unused, axis=0), axis=0)
        log_q = jax.nn.log_softmax(mask_unused(_logits(ref_embedding, pair[1], temperature), unused, axis=0), axis=0)
        # An unused id has probability zero and log-probability -inf under both.
        return (jnp.exp(log_p) * mask_unused(log_p - log_q, unused, axis=0, value=0.0)).sum(0)

    return jax.lax.map(divergence, (_split(hidden, chunk), _split(ref_hidden, chunk))).T.ravel()[: hidden.shape[0]]


def _split(x: Array, chunk: int) -> Array:
    """[N, ...] padded and cut into [chunks, chunk, ...]. A chunk is every n-th token, so that tokens sharded over devices
    leave each device its share of every chunk."""
    chunk = max(min(chunk, x.shape[0]), 1)
    padded = jnp.pad(x, ((0, -x.shape[0] % chunk), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(chunk, -1, *x.shape[1:]).swapaxes(0, 1)


def _nucleus(log_p, top_p, axis):
    """log_p with -inf outside the smallest set of likeliest words that holds at least top_p."""
    ordered = jnp.flip(jnp.sort(jax.lax.stop_gradient(log_p), axis=axis), axis=axis)
    before = jnp.cumsum(jnp.exp(ordered), axis=axis) - jnp.exp(ordered)
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=axis, keepdims=True)
    return jnp.where(log_p >= least, log_p, -jnp.inf)


def _accumulated_in(hidden):
    return jnp.promote_types(hidden.dtype, jnp.float32)


def _logits(embedding, hidden, temperature):
    """[V, chunk], in float32 at least."""
    return jnp.matmul(embedding, hidden.T, preferred_element_type=_accumulated_in(hidden)) / temperature


def _is_label(logits, labels):
    """[V, chunk]: whether a word is the token's label."""
    return jax.lax.broadcasted_iota(labels.dtype, logits.shape, 0) == labels[None]


def _log_nucleus(log_p, top_p):
    """Log-probabilities [V, chunk] of the distribution whose entropy is taken, -inf where it has none."""
    return log_p if top_p is None else jax.nn.log_softmax(_nucleus(log_p, top_p, axis=0), axis=0)


def _statistics(top_p, unused, embedding, hidden, labels, temperature):
    """(log-probability, entropy, log-normalizer), each [chunk]."""
    logits = _logits(embedding, hidden, temperature)
    chosen = jnp.where(_is_label(logits, labels), logits, 0.0).sum(0)
    logits = mask_unused(logits, unused, axis=0)
    log_z = jax.nn.logsumexp(logits, axis=0)
    log_q = _log_nucleus(logits - log_z[None], top_p)
    entropy = -(jnp.exp(log_q) * jnp.where(jnp.isneginf(log_q), 0.0, log_q)).sum(0)
    return chosen - log_z, entropy, log_z


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head(top_p, unused, chunks, embedding, labels, temperature):
    return _head_forward(top_p, unused, chunks, embedding, labels, temperature)[0]


def _head_forward(top_p, unused, chunks, embedding, labels, temperature):
    log_prob, entropy, log_z = jax.lax.map(
        lambda chunk: _statistics(top_p, unused, embedding, chunk[0], chunk[1], temperature), (chunks, labels)
    )
    return (log_prob, entropy), (chunks, embedding, labels, temperature, log_z, entropy)


def _head_backward(top_p, unused, residuals, cotangents):
    chunks, embedding, labels, temperature, log_z, entropy = residuals

    def step(embedding_gradient, chunk):
        hidden, label, log_z, entropy, g_log_prob, g_entropy = chunk
        log_p = mask_unused(_logits(embedding, hidden, temperature), unused, axis=0) - log_z[None]
        log_q = _log_nucleus(log_p, top_p)
        surprise = jnp.where(jnp.isneginf(log_q), 0.0, log_q) + entropy[None]
        gradient = -g_log_prob[None] * jnp.exp(log_p) - g_entropy[None] * jnp.exp(log_q) * surprise
        gradient += jnp.where(_is_label(log_p, label), g_log_prob[None], 0.0)
        gradient = (gradient / temperature).astype(embedding.dtype)
        embedding_gradient += jnp.matmul(gradient, hidden, preferred_element_type=embedding_gradient.dtype)
        return embedding_gradient, jnp.matmul(gradient.T, embedding).astype(hidden.dtype)

    start = jnp.zeros(embedding.shape, _accumulated_in(embedding))
    embedding_gradient, hidden_gradient = jax.lax.scan(step, start, (chunks, labels, log_z, entropy, *cotangents))
    return hidden_gradient, embedding_gradient.astype(embedding.dtype), None, jnp.zeros_like(temperature)


_head.defvjp(_head_forward, _head_backward)
