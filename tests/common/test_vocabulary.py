"""Ids that the tokenizer does not define: a model with such rows samples and learns as the model without them does.

The model without them, whose embedding ends with the tokenizer, is the reference of every test. The rows that are added are
large: a policy that could emit their ids would hardly emit anything else.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from epo_jax.common.errors import UserError
from epo_jax.common.vocabulary import unused_ids
from epo_jax.models import generate
from epo_jax.models.decoder import init_params, param_axes
from epo_jax.models.tokenizer import train_tokenizer
from epo_jax.objectives.batch import NO_ARRAYS
from epo_jax.objectives.head import fused_full_kl, fused_log_prob_entropy
from epo_jax.parallel import mesh
from epo_jax.runs.policies import fit_vocabulary
from epo_jax.training import sft
from epo_jax.training.policy_tokens import policy_statistics
from epo_jax.training.state import init_state_on
from epo_jax.training.step import batch_shardings, make_train_step
from tests import tiny

fresh = jax.jit(init_params, static_argnums=0)
V = tiny.MODEL.vocab_size
ROWS = 32
# The tail, as of Qwen2.5; and also ids between those that the tokenizer defines.
LAYOUTS = {"tail": np.arange(V), "gaps": np.r_[0:5, 7:20, 24:29]}
PADDED = dataclasses.replace(tiny.MODEL, vocab_size=ROWS, unused_ids=unused_ids(range(V), ROWS))


def padded(table, ids):
    """A table [V, D] with row i at id ids[i], and large rows elsewhere."""
    return (5.0 * jax.random.normal(jax.random.key(9), (ROWS, table.shape[1]))).at[ids].set(table)


def test_ranges_of_ids():
    assert unused_ids(range(8), 8) == ()
    assert unused_ids([4, 0, 1], 8) == ((2, 4), (5, 8))
    assert unused_ids([3], 4) == ((0, 3),)


def test_a_model_is_fitted_to_the_ids_of_its_tokenizer():
    tokenizer = train_tokenizer(["take apple 1 from cabinet 3"], 300)
    size = tokenizer.vocab_size
    model = dataclasses.replace(tiny.MODEL, vocab_size=size)
    assert fit_vocabulary(model, tokenizer, "folder") == model
    wider = dataclasses.replace(model, vocab_size=size + 7)
    assert fit_vocabulary(wider, tokenizer, "folder").unused_ids == ((size, size + 7),)
    with pytest.raises(UserError, match=f"folder: .* ids up to {size - 1} .* vocab_size of {size - 1}"):
        fit_vocabulary(dataclasses.replace(model, vocab_size=size - 1), tokenizer, "folder")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("top_p", [None, 0.8])
def test_values_and_gradients_of_the_head(layout, top_p):
    keys, ids = jax.random.split(jax.random.key(0), 4), LAYOUTS[layout]
    hidden, table = jax.random.normal(keys[0], (13, 5)), jax.random.normal(keys[1], (V, 5))
    labels = jax.random.randint(keys[2], (13,), 0, V)
    u, w = jax.random.normal(keys[3], (2, 13))

    def loss(hidden, table, labels, unused=()):
        log_prob, entropy = fused_log_prob_entropy(hidden, table, labels, 0.7, 4, top_p, unused)
        return (u * log_prob + w * entropy).sum(), (log_prob, entropy)

    grad = jax.grad(loss, (0, 1), has_aux=True)
    (dh, de), values = grad(hidden, padded(table, ids), jnp.asarray(ids)[labels], unused_ids(ids, ROWS))
    (wanted_dh, wanted_de), wanted = grad(hidden, table, labels)
    for found, expected in zip((dh, de[ids], *values), (wanted_dh, wanted_de, *wanted), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not de[np.setdiff1d(np.arange(ROWS), ids)].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_kl_and_its_gradient(layout):
    keys, ids = jax.random.split(jax.random.key(1), 4), LAYOUTS[layout]
    hidden, other = jax.random.normal(keys[0], (2, 13, 5))
    table, ref = jax.random.normal(keys[1], (2, V, 5))

    def kl(hidden, table, ref, unused=()):
        return fused_full_kl(hidden, table, other, ref, 0.7, 4, unused).sum()

    grad = jax.value_and_grad(kl, (0, 1))
    value, (dh, de) = grad(hidden, padded(table, ids), padded(ref, ids), unused_ids(ids, ROWS))
    wanted, (wanted_dh, wanted_de) = grad(hidden, table, ref)
    for found, expected in zip((value, dh, de[ids]), (wanted, wanted_dh, wanted_de), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not de[np.setdiff1d(np.arange(ROWS), ids)].any()


def test_padding_may_have_any_label():
    """Rows are padded with id 0, which a tokenizer need not define: a number without meaning there, but no infinity."""
    hidden, table = jnp.ones((2, 5)), jnp.ones((8, 5))

    def loss(hidden):
        return fused_log_prob_entropy(hidden, table, jnp.zeros(2, jnp.int32), unused=((0, 2),))[0].sum()

    assert all(np.isfinite(x).all() for x in jax.value_and_grad(loss)(hidden))


@functools.cache
def wide_params():
    params = tiny.as_params()
    return params | {"embedding": padded(params["embedding"], LAYOUTS["tail"])}


def sampled(model, params, temperature, top_k, top_p):
    """12 tokens for each of 64 slots after one of their own."""
    n = 64
    ints = jnp.zeros(n, jnp.int32)
    first = jnp.arange(n, dtype=jnp.int32)[:, None] % V
    cache = generate.extend(model, params, generate.init_cache(model, n, 16), first, ints + 1, ints == 0)
    how = generate.Sampling(jnp.full(n, temperature), ints + top_k, jnp.full(n, top_p))
    given = cache, jax.random.key(1), jnp.arange(n, dtype=jnp.int32), ints, ints, ints + 12, how, jnp.array([-1]), 12
    return first, generate.decode(model, params, *given)[1]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.0, 0, 1.0), (1.3, 30, 0.95)])
def test_the_sampler_draws_what_the_smaller_model_draws(temperature, top_k, top_p):
    _, wanted = sampled(tiny.MODEL, tiny.as_params(), temperature, top_k, top_p)
    _, found = sampled(PADDED, wide_params(), temperature, top_k, top_p)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.log_prob, wanted.log_prob, atol=1e-5)
    np.testing.assert_allclose(found.entropy, wanted.entropy, atol=1e-5)


def test_the_sampler_with_its_head_cut_over_devices():
    """Each device masks its own rows: the unused ids begin inside the third device's."""
    on = mesh.make_mesh(1, 1, 4)
    placed = jax.device_put(wide_params(), mesh.replicated(on))
    placed["embedding"] = jax.device_put(placed["embedding"], jax.sharding.NamedSharding(on, mesh.spec("vocab", "embed")))
    _, wanted = sampled(PADDED, wide_params(), 1.0, 0, 1.0)
    _, found = sampled(PADDED, placed, 1.0, 0, 1.0)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.log_prob, wanted.log_prob, atol=1e-5)


def test_the_learner_scores_what_was_sampled():
    first, out = sampled(PADDED, wide_params(), 1.0, 0, 1.0)
    assert out.tokens.max() < V
    tokens = jnp.concatenate([first, out.tokens[:, :-1]], axis=1)
    place = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), tokens.shape)
    rows = NO_ARRAYS._replace(tokens=tokens, positions=place, segment_ids=jnp.ones_like(tokens), index=place, label=out.tokens)
    log_prob, entropy = policy_statistics(PADDED, wide_params(), rows, 1.0)
    np.testing.assert_allclose(log_prob, out.log_prob, atol=1e-5)
    np.testing.assert_allclose(entropy, out.entropy, atol=1e-5)


def gradient(config, embedding, hyper, batch, on=None):
    """(gradient, metrics) of the first update of a policy with this embedding, held near a reference policy."""
    on = on or mesh.make_mesh(1, 1, 1)
    policy, reference = (fresh(config.model, jax.random.key(seed)) | {"embedding": table} for seed, table in enumerate(embedding))
    placed = [jax.device_put(x, mesh.shardings(on, x, param_axes(config.model))) for x in (policy, reference)]
    state = init_state_on(config, placed[0], on)._replace(reference=placed[1])
    given = jax.device_put(batch, batch_shardings(on)), jax.device_put(hyper, mesh.replicated(on))
    state, metrics = make_train_step(config, on)(state, *given)
    moment = optax.tree_utils.tree_get(state.opt_state, "mu")
    return jax.tree.map(lambda m: np.asarray(m) / (1.0 - config.optim.b1), moment), metrics


@pytest.mark.parametrize(
    ("arm", "kl", "shape"),
    [("grpo+siren", "k3", (1, 1, 1)), ("grpo+epo", "full", (2, 2, 2))],
    ids=["nucleus and reference", "full KL on a mesh"],
)
def test_an_update_is_that_of_the_smaller_model(arm, kl, shape):
    """With the embedding cut along "tensor", the unused ids begin inside the second part."""
    config, hyper = tiny.learner(arm, 8, kl=kl, kl_coef=0.5)
    model = dataclasses.replace(tiny.MODEL, num_kv_heads=2)
    batch = tiny.batched(tiny.episodes(0), 1, 8)
    small = 0.6 * jax.random.normal(jax.random.key(5), (2, V, model.d_model))
    wide = [padded(table, LAYOUTS["tail"]) for table in small]
    wanted, metrics = gradient(dataclasses.replace(config, model=model), small, hyper, batch)
    model = dataclasses.replace(model, vocab_size=ROWS, unused_ids=PADDED.unused_ids)
    found, wide_metrics = gradient(dataclasses.replace(config, model=model), wide, hyper, batch, mesh.make_mesh(*shape))
    assert metrics["kl"] > 0.01 and not found["embedding"][V:].any()
    found["embedding"] = found["embedding"][:V]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, wanted)
    for name in metrics:
        np.testing.assert_allclose(wide_metrics[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_warm_start_is_that_of_the_smaller_model():
    packed = tiny.batched(tiny.episodes(0), 1)
    rows = jax.tree.map(lambda x: jnp.asarray(x[0]), packed.by_row())
    losses = [
        jax.jit(functools.partial(sft.cloning_loss, model, batch=rows, prompt_weight=0.3))(params)
        for model, params in ((tiny.MODEL, tiny.as_params()), (PADDED, wide_params()))
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
