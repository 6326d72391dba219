import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from epo_jax.objectives.head import fused_full_kl, fused_log_prob_entropy, log_prob_entropy_from_logits

N, D, V = 13, 5, 17


def problem(dtype=jnp.float32, scale=1.0):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = scale * jax.random.normal(keys[0], (N, D))
    embedding = jax.random.normal(keys[1], (V, D))
    labels = jax.random.randint(keys[2], (N,), 0, V)
    weights = jax.random.normal(keys[3], (N,)), jax.random.normal(keys[4], (N,))
    return hidden.astype(dtype), embedding.astype(dtype), labels, weights


def direct(hidden, embedding, labels, temperature):
    """log p(label) and -sum p log p, written out."""
    logits = hidden @ embedding.T / temperature
    p = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
    return jnp.log(p)[jnp.arange(labels.size), labels], -(p * jnp.log(p)).sum(-1)


@pytest.mark.parametrize("chunk, temperature", [(4, 0.4), (64, 1.0)])
def test_values_and_gradients_against_float64(chunk, temperature):
    hidden, embedding, labels, (u, w) = problem()

    def loss(head, hidden, embedding, u, w, **kwargs):
        log_prob, entropy = head(hidden, embedding, labels, temperature, **kwargs)
        return (u * log_prob + w * entropy).sum(), (log_prob, entropy)

    found = jax.jit(jax.grad(lambda h, e: loss(fused_log_prob_entropy, h, e, u, w, chunk=chunk), (0, 1), has_aux=True))
    (dh, de), values = found(hidden, embedding)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x), jnp.float64) for x in (hidden, embedding, u, w)]
        (dh64, de64), values64 = jax.grad(lambda h, e: loss(direct, h, e, *exact[2:]), (0, 1), has_aux=True)(*exact[:2])
    for a, b in zip((dh, de, *values), (dh64, de64, *values64), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_vmap_and_checkpoint():
    hidden, embedding, labels, _ = problem()

    def gradient(hidden, embedding, temperature):
        @jax.checkpoint
        def head(h):
            return sum(x.sum() for x in fused_log_prob_entropy(h, embedding, labels, temperature, 4))

        return jax.grad(head)(hidden)

    members = jnp.stack([hidden, 2.0 * hidden]), jnp.stack([embedding, -embedding]), jnp.array([1.0, 0.5])
    mapped = jax.vmap(gradient)(*members)
    for m in range(2):
        np.testing.assert_allclose(mapped[m], gradient(*(x[m] for x in members)), rtol=1e-5, atol=1e-5)


def test_bfloat16_inputs_give_float32_statistics():
    hidden, embedding, labels, _ = problem(jnp.bfloat16)
    found = fused_log_prob_entropy(hidden, embedding, labels, 1.0, 4)
    expected = direct(hidden.astype(jnp.float32), embedding.astype(jnp.float32), labels, 1.0)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda h: fused_log_prob_entropy(h, embedding, labels)[0].sum())(hidden)
    assert gradient.dtype == jnp.bfloat16


def test_a_certain_distribution_has_zero_entropy_and_finite_gradient():
    hidden, embedding, labels, _ = problem(scale=1e4)
    value, gradient = jax.value_and_grad(lambda h: fused_log_prob_entropy(h, embedding, labels)[1].sum())(hidden)
    assert value < 1e-3 and jnp.isfinite(gradient).all()


def test_masked_words_are_left_out_of_the_entropy():
    logits = jnp.array([[0.0, -jnp.inf, 0.0]])
    log_prob, entropy = log_prob_entropy_from_logits(logits, jnp.array([2]))
    np.testing.assert_allclose((log_prob[0], entropy[0]), (-np.log(2), np.log(2)), rtol=1e-6)


def test_nucleus_entropy():
    """p = (1/2, 1/4, 1/8, 1/8): the nucleus of 0.7 is the first two words, renormalised to (2/3, 1/3)."""
    p = jnp.array([[0.5, 0.25, 0.125, 0.125]])
    log_prob, entropy = log_prob_entropy_from_logits(jnp.log(p), jnp.array([3]), 1.0, top_p=0.7)
    np.testing.assert_allclose(entropy, [np.log(3) - 2 / 3 * np.log(2)], rtol=1e-5)
    np.testing.assert_allclose(log_prob, [np.log(0.125)], rtol=1e-5)


def test_fused_nucleus_agrees_with_autodiff_of_logits():
    hidden, embedding, labels, (u, w) = problem()

    def fused(h, e):
        log_prob, entropy = fused_log_prob_entropy(h, e, labels, 0.7, 4, top_p=0.8)
        return (u * log_prob + w * entropy).sum()

    def plain(h, e):
        log_prob, entropy = log_prob_entropy_from_logits(h @ e.T, labels, 0.7, top_p=0.8)
        return (u * log_prob + w * entropy).sum()

    found, expected = (jax.value_and_grad(f, (0, 1))(hidden, embedding) for f in (fused, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_full_kl():
    hidden, embedding, _, _ = problem()
    other = embedding[::-1]

    def written_out(h):
        log_p, log_q = jax.nn.log_softmax(h @ embedding.T / 0.7), jax.nn.log_softmax(hidden @ other.T / 0.7)
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)

    def fused(h):
        return fused_full_kl(h, embedding, hidden, other, 0.7, 4)

    np.testing.assert_allclose(fused(hidden), written_out(hidden), rtol=1e-4, atol=1e-6)
    found, expected = (jax.grad(lambda h, f=f: f(h).sum())(hidden) for f in (fused, written_out))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def relative(found, exact):
    return np.linalg.norm(np.asarray(found, np.float64) - np.asarray(exact)) / np.linalg.norm(exact)


def test_gradients_are_those_of_the_naive_form_to_1e_6():
    """At the sizes of a small model; the naive form and its autodiff in float64."""
    keys = jax.random.split(jax.random.key(7), 3)
    hidden, embedding = jax.random.normal(keys[0], (40, 64)), 0.3 * jax.random.normal(keys[1], (501, 64))
    labels = jax.random.randint(keys[2], (40,), 0, 501)
    weights = np.random.default_rng(0).normal(size=(2, 40))

    def gradient(head, dtype):
        u, w = jnp.asarray(weights, dtype)

        def loss(h, e):
            log_prob, entropy = head(h, e)
            return (u * log_prob + w * entropy).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(np.asarray(hidden), dtype), jnp.asarray(np.asarray(embedding), dtype))

    def fused(h, e):
        return fused_log_prob_entropy(h, e, labels, 0.75, 16)

    single = gradient(fused, jnp.float32)
    with jax.enable_x64(True):
        exact = gradient(lambda h, e: direct(h, e, labels, 0.75), jnp.float64)
        double = gradient(fused, jnp.float64)
    for found, wanted in zip(single, exact, strict=True):
        assert relative(found, wanted) < 1e-6
    for found, wanted in zip(double, exact, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-12)


def test_a_vocabulary_sharded_over_devices_stays_where_it_is():
    """Tokens over two devices, words over four: the values of one device, and no word's row ever leaves its device."""
    keys = jax.random.split(jax.random.key(8), 4)
    hidden, embedding = jax.random.normal(keys[0], (64, 16)), jax.random.normal(keys[1], (96, 16))
    labels = jax.random.randint(keys[2], (64,), 0, 96)
    u, w = jax.random.normal(keys[3], (2, 64))

    def loss(hidden, embedding, labels, u, w):
        log_prob, entropy = fused_log_prob_entropy(hidden, embedding, labels, 0.7, 16)
        return (u * log_prob + w * entropy).sum()

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = (P("data"), P("tensor"), P("data"), P("data"), P("data"))
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((hidden, embedding, labels, u, w), specs, strict=True)]
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*placed).compile()
    value, (dh, de) = compiled(*placed)
    wanted, (wanted_dh, wanted_de) = jax.value_and_grad(loss, (0, 1))(hidden, embedding, labels, u, w)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(dh, wanted_dh, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(de, wanted_de, rtol=1e-4, atol=1e-5)
    assert de.sharding.spec == P("tensor") or de.sharding.spec == P("tensor", None)
    program = compiled.as_text()
    assert "all-reduce" in program
    moved = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute)", program)
    sizes = [np.prod([int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n], initial=1) for shape in moved]
    assert all(size < 96 * 16 / 4 for size in sizes), moved  # less than one device's share of the embedding
