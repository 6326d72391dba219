"""The decoder: cache against plain forward, packing against separate rows, and the Hugging Face implementation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.models.decoder import DecoderConfig, bind, init_params
from epo_jax.models.generate import extend, init_cache

CONFIG = DecoderConfig(vocab_size=97, d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=48)


@pytest.fixture(scope="module")
def params():
    """Random everywhere: the zero-initialised projections would hide every fault behind them."""
    params = init_params(CONFIG, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def forward(params, tokens, positions=None, segment_ids=None, config=CONFIG):
    shape = tokens.shape
    positions = jnp.tile(jnp.arange(shape[1])[None], (shape[0], 1)) if positions is None else positions
    segment_ids = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    return _forward(config, params, tokens, positions, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, tokens, positions, segment_ids):
    return bind(config, params)(tokens, positions, segment_ids)


def test_packed_trajectories_do_not_see_each_other(params):
    first, second = jax.random.randint(jax.random.key(2), (2, 1, 150), 0, 97)
    apart = forward(params, first), forward(params, second[:, :40])
    packed = jnp.concatenate([first, second[:, :40], jnp.zeros((1, 10), jnp.int32)], axis=1)
    segments = jnp.concatenate([jnp.full((1, 150), 1), jnp.full((1, 40), 2), jnp.zeros((1, 10), int)], axis=1)
    positions = jnp.concatenate([jnp.arange(150), jnp.arange(40), jnp.arange(10)])[None]
    together = forward(params, packed, positions, segments)
    np.testing.assert_allclose(together[:, :150], apart[0], atol=2e-5)
    np.testing.assert_allclose(together[:, 150:190], apart[1], atol=2e-5)


def test_attention_is_causal(params):
    tokens = jax.random.randint(jax.random.key(3), (1, 20), 0, 97)
    changed = tokens.at[0, 12].set((tokens[0, 12] + 1) % 97)
    before, after = forward(params, tokens), forward(params, changed)
    np.testing.assert_allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert jnp.abs(before[:, 12:] - after[:, 12:]).max() > 1e-3


def test_extending_a_cache_piece_by_piece_equals_the_plain_forward(params):
    tokens = jax.random.randint(jax.random.key(4), (3, 30), 0, 97)
    want = forward(params, tokens)
    cache = init_cache(CONFIG, slots=3, capacity=40)
    fresh = jnp.array([True, True, True])
    done = np.zeros(3, int)
    # Ragged pieces, one of them empty for some slot.
    for counts in ([5, 1, 8], [1, 0, 3], [8, 7, 2]):
        piece = np.zeros((3, 8), np.int32)
        for slot, count in enumerate(counts):
            piece[slot, :count] = tokens[slot, done[slot] : done[slot] + count]
            done[slot] += count
        cache = extend(CONFIG, params, cache, piece, jnp.array(counts, jnp.int32), fresh)
        fresh = jnp.zeros(3, bool)
        for slot, count in enumerate(counts):
            if count:
                np.testing.assert_allclose(cache.hidden[slot], want[slot, done[slot] - 1], atol=2e-5)
    assert cache.lengths.tolist() == done.tolist()


def test_a_fresh_slot_forgets_its_last_episode(params):
    tokens = jax.random.randint(jax.random.key(5), (2, 16), 0, 97)
    cache = init_cache(CONFIG, slots=1, capacity=24)
    full = jnp.array([16], jnp.int32)
    cache = extend(CONFIG, params, cache, tokens[:1], full, jnp.array([True]))
    cache = extend(CONFIG, params, cache, tokens[1:], full, jnp.array([True]))
    np.testing.assert_allclose(cache.hidden[0], forward(params, tokens[1:])[0, -1], atol=2e-5)


def test_rematerialisation_changes_no_gradient_and_keeps_less_and_less(params):
    tokens = jax.random.randint(jax.random.key(6), (4, 150), 0, 97)
    gradients, kept = [], []
    for policy in ("none", "dots", "attention", "full"):
        config = dataclasses.replace(CONFIG, num_layers=9, remat=policy)  # a loop over layers, not unrolled
        deep = params | {"layers": jax.tree.map(lambda x: jnp.concatenate([x, x, x]), params["layers"])}
        gradient = jax.jit(jax.grad(lambda p, c=config: jnp.square(forward(p, tokens, config=c)).sum()))
        compiled = gradient.lower(deep).compile()
        gradients.append(compiled(deep))
        kept.append(compiled.memory_analysis().temp_size_in_bytes)
    for gradient in gradients[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2), gradients[0], gradient)
    assert kept == sorted(kept, reverse=True) and kept[-1] < 0.5 * kept[0], kept


def test_a_profile_shows_the_parts_of_the_model(params):
    """The operations of learner and sampler carry the names of the sub-blocks that they belong to."""
    tokens = jnp.zeros((2, 8), jnp.int32)
    learner = _forward.lower(CONFIG, params, tokens, tokens, tokens).as_text(debug_info=True)
    sampler = extend.lower(CONFIG, params, init_cache(CONFIG, 2, 16), tokens, jnp.ones(2, int), jnp.ones(2, bool))
    for text in (learner, sampler.as_text(debug_info=True)):
        for part in ("embed", "rope", "block/attention", "block/mlp"):
            assert f"{part}/" in text, part
    assert "block/kv_cache/" in sampler.as_text(debug_info=True)
