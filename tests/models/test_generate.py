"""Sampling: the right distribution, the recorded numbers, and keys that belong to the episode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from epo_jax.models.decoder import DecoderConfig, bind, init_params
from epo_jax.models.generate import decode, extend, init_cache, sample

CONFIG = DecoderConfig(vocab_size=23, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24)
BLOCK = 6


@pytest.fixture(scope="module")
def params():
    params = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)


def run(params, prompts, episodes, stop=-1, temperature=1.0, budget=BLOCK, key=7):
    slots = len(prompts)
    cache = init_cache(CONFIG, slots, 32)
    counts = jnp.full((slots,), prompts.shape[1], jnp.int32)
    cache = extend(CONFIG, params, cache, prompts, counts, jnp.ones(slots, bool))
    return decode(
        CONFIG, params, cache, jax.random.key(key),
        episode=jnp.array(episodes, jnp.int32),
        turn=jnp.zeros(slots, jnp.int32),
        budget=jnp.full(slots, budget, jnp.int32),
        temperature=jnp.full(slots, temperature, jnp.float32),
        stop_token=jnp.int32(stop),
        block=BLOCK,
    )  # fmt: skip


def plain_statistics(params, ids, temperature):
    """Log-probability of each token of `ids` given those before it, and the entropy there, by the plain forward."""
    model = bind(CONFIG, params)
    tokens = jnp.asarray(ids)[None]
    hidden = model(tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
    log_probs = jax.nn.log_softmax(hidden[0] @ model.output_embedding().T / temperature)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
    return log_probs[jnp.arange(len(ids) - 1), tokens[0, 1:]], entropy[:-1]


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_recorded_statistics_are_those_of_the_plain_forward(params, temperature):
    prompts = jax.random.randint(jax.random.key(1), (3, 5), 0, 23)
    _, out = run(params, prompts, [0, 1, 2], temperature=temperature)
    for slot in range(3):
        ids = np.concatenate([prompts[slot], out.tokens[slot]])
        log_prob, entropy = plain_statistics(params, ids, temperature)
        np.testing.assert_allclose(out.log_prob[slot], log_prob[4:], atol=1e-4)
        np.testing.assert_allclose(out.entropy[slot], entropy[4:], atol=1e-4)


def test_a_trajectory_depends_on_its_episode_and_not_on_its_slot(params):
    prompts = jax.random.randint(jax.random.key(2), (4, 5), 0, 23)
    _, out = run(params, prompts, [10, 11, 12, 13])
    turned = jnp.array([2, 0, 3, 1])
    _, again = run(params, prompts[turned], [12, 10, 13, 11])
    np.testing.assert_array_equal(again.tokens, out.tokens[turned])
    _, other = run(params, prompts, [14, 15, 16, 17])
    assert (other.tokens != out.tokens).any()


def test_decoding_stops_at_the_stop_token_and_at_the_budget(params):
    prompts = jax.random.randint(jax.random.key(3), (8, 5), 0, 23)
    _, free = run(params, prompts, range(8))
    stop = int(free.tokens[0, 2])
    cache, out = run(params, prompts, range(8), stop=stop)
    for slot in range(8):
        hits = np.flatnonzero(free.tokens[slot] == stop)
        want = int(hits[0]) + 1 if len(hits) else BLOCK
        assert out.counts[slot] == want
        np.testing.assert_array_equal(out.tokens[slot, :want], free.tokens[slot, :want])
        assert not out.tokens[slot, want:].any() and not out.log_prob[slot, want:].any()
    assert cache.lengths.tolist() == (out.counts + 5).tolist()
    _, short = run(params, prompts, range(8), budget=2)
    assert short.counts.tolist() == [2] * 8


def test_a_slot_without_budget_is_left_alone(params):
    prompts = jax.random.randint(jax.random.key(4), (2, 5), 0, 23)
    cache, out = run(params, prompts, [0, 1], budget=0)
    assert cache.lengths.tolist() == [5, 5] and not out.counts.any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_softmax(temperature):
    logits = jnp.array([1.0, 0.0, -1.0, 2.0, 0.5])
    n = 20_000
    keys = jax.random.split(jax.random.key(0), n)
    tokens, log_prob, entropy = sample(keys, jnp.tile(logits[None], (n, 1)), jnp.full(n, temperature))
    probs = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    counts = np.bincount(tokens, minlength=5)
    assert stats.chisquare(counts, probs / probs.sum() * n).pvalue > 1e-3
    np.testing.assert_allclose(log_prob, np.log(probs)[tokens], rtol=1e-5)
    np.testing.assert_allclose(entropy, -(probs * np.log(probs)).sum(), rtol=1e-5)


def test_temperature_zero_takes_the_likeliest_token():
    logits = jax.random.normal(jax.random.key(5), (50, 9))
    tokens, _, _ = sample(jax.random.split(jax.random.key(6), 50), logits, jnp.zeros(50))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
