"""Sampling: the right distribution, the recorded numbers, and keys that belong to the episode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from epo_jax.models import generate, kv_cache
from epo_jax.models.decoder import DecoderConfig, bind, init_params, unstack
from epo_jax.models.generate import Sampling, copy_slots, decode, extend, init_cache, sample, take_slots

CONFIG = DecoderConfig(vocab_size=23, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24)
BLOCK = 6


def draw_params(seed):
    params = init_params(CONFIG, jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size + seed), x.shape), params)


@pytest.fixture(scope="module")
def params():
    return draw_params(0)


def sampling(slots, temperature=1.0, top_k=0, top_p=1.0):
    whole = (jnp.full(slots, x, dtype) for x, dtype in ((temperature, "float32"), (top_k, "int32"), (top_p, "float32")))
    return Sampling(*whole)


def prefill(params, prompts, capacity=32):
    slots, length = prompts.shape
    counts = jnp.full((slots,), length, jnp.int32)
    return extend(CONFIG, params, init_cache(CONFIG, slots, capacity), prompts, counts, jnp.ones(slots, bool))


def sample_turn(params, cache, episodes, stop=(-1,), budget=BLOCK, key=7, turn=0, position=0, block=BLOCK, **how):
    slots = len(episodes)
    return decode(
        CONFIG, params, cache, jax.random.key(key),
        episode=jnp.array(episodes, jnp.int32),
        turn=jnp.full(slots, turn, jnp.int32),
        position=jnp.full(slots, position, jnp.int32),
        budget=jnp.broadcast_to(jnp.asarray(budget, jnp.int32), (slots,)),
        sampling=sampling(slots, **how),
        stop_tokens=jnp.array(stop, jnp.int32),
        block=block,
    )  # fmt: skip


def run(params, prompts, episodes, **options):
    return sample_turn(params, prefill(params, prompts), list(episodes), **options)


def random_prompts(seed, slots, length=5):
    return jax.random.randint(jax.random.key(seed), (slots, length), 0, 23)


def test_unstacked_parameters_are_those_of_the_stack(params):
    unstacked = unstack(CONFIG, params)
    for i, layer in unstacked["layers"].items():
        for name, array in layer.items():
            np.testing.assert_array_equal(array, params["layers"][name][i])
    again = unstack(CONFIG, unstacked)
    assert jax.tree.structure(again) == jax.tree.structure(unstacked)
    prompts = random_prompts(3, 4)
    for a, b in zip(run(unstacked, prompts, range(4))[1], run(params, prompts, range(4))[1], strict=True):
        np.testing.assert_array_equal(a, b)
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(unstack(half, params))} == {jnp.dtype("bfloat16")}


def test_a_call_copies_no_layers():
    config = dataclasses.replace(CONFIG, d_model=64, num_layers=4, d_ff=256)
    params = unstack(config, init_params(config, jax.random.key(0)))
    ints = jnp.zeros(2, jnp.int32)
    given = params, init_cache(config, 2, 16), jax.random.key(0), ints, ints, ints, ints
    lowered = decode.lower(config, *given, sampling=sampling(2), stop_tokens=jnp.array([-1]), block=4)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporary < sum(x.nbytes for x in jax.tree.leaves(params["layers"])) / 4


def plain_statistics(params, ids, temperature, top_p=1.0):
    """Log-probability of each token of `ids` given those before it, and the entropy there, by the plain forward; in NumPy."""
    model = bind(CONFIG, params)
    tokens = jnp.asarray(ids)[None]
    hidden = model(tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
    logits = np.asarray(hidden[0] @ model.output_embedding().T, np.float64) / temperature
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    for row in probs:
        order = np.argsort(-row)
        row[order[np.cumsum(row[order]) - row[order] >= top_p]] = 0.0
    probs /= probs.sum(-1, keepdims=True)
    entropy = -(probs * np.log(np.where(probs > 0, probs, 1.0))).sum(-1)
    return np.log(probs[np.arange(len(ids) - 1), np.asarray(ids)[1:]]), entropy[:-1]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.4, 1.0), (1.0, 0.7)])
def test_recorded_statistics_are_those_of_the_plain_forward(params, temperature, top_p):
    prompts = random_prompts(1, 4)
    _, out = run(params, prompts, range(4), temperature=temperature, top_p=top_p)
    for slot in range(4):
        ids = np.concatenate([prompts[slot], out.tokens[slot]])
        with np.errstate(divide="ignore"):  # tokens of the prompt may lie outside the nucleus
            log_prob, entropy = plain_statistics(params, ids, temperature, top_p)
        np.testing.assert_allclose(out.log_prob[slot], log_prob[4:], atol=1e-4)
        np.testing.assert_allclose(out.entropy[slot], entropy[4:], atol=1e-4)


def test_a_trajectory_depends_on_its_episode_and_not_on_its_slot(params):
    prompts = random_prompts(2, 4)
    _, out = run(params, prompts, [10, 11, 12, 13])
    turned = jnp.array([2, 0, 3, 1])
    _, again = run(params, prompts[turned], [12, 10, 13, 11])
    np.testing.assert_array_equal(again.tokens, out.tokens[turned])
    _, other = run(params, prompts, [14, 15, 16, 17])
    assert (other.tokens != out.tokens).any()


def test_decoding_stops_at_each_stop_token_and_at_the_budget(params):
    prompts = random_prompts(3, 4)
    _, free = run(params, prompts, range(4))
    stop = [int(free.tokens[0, 2]), int(free.tokens[1, 1])]
    cache, out = run(params, prompts, range(4), stop=stop)
    for slot in range(4):
        hits = np.flatnonzero(np.isin(free.tokens[slot], stop))
        want = int(hits[0]) + 1 if len(hits) else BLOCK
        assert out.counts[slot] == want
        np.testing.assert_array_equal(out.tokens[slot, :want], free.tokens[slot, :want])
        assert not out.tokens[slot, want:].any() and not out.log_prob[slot, want:].any()
    assert cache.lengths.tolist() == (out.counts + 5 - 1).tolist()  # the last token waits for the next extend
    cache, short = run(params, prompts, range(4), budget=[2, 0, 3, 9])
    assert short.counts.tolist() == [2, 0, 3, BLOCK] and cache.lengths.tolist() == [6, 5, 7, 4 + BLOCK]


def test_a_turn_cut_into_blocks_is_the_same_turn(params):
    prompts = random_prompts(3, 4)
    _, whole = run(params, prompts, range(4))
    cache, first = run(params, prompts, range(4), budget=2)
    left = jnp.zeros((4, 5), jnp.int32).at[:, 0].set(first.tokens[:, 1])
    cache = extend(CONFIG, params, cache, left, jnp.ones(4, jnp.int32), jnp.zeros(4, bool))
    _, rest = sample_turn(params, cache, range(4), position=2, budget=BLOCK - 2)
    np.testing.assert_array_equal(jnp.concatenate([first.tokens[:, :2], rest.tokens[:, :4]], 1), whole.tokens)
    np.testing.assert_allclose(jnp.concatenate([first.entropy[:, :2], rest.entropy[:, :4]], 1), whole.entropy, atol=1e-5)


def test_extending_chosen_slots_touches_no_other(params):
    """Two of four slots grow, one of them emptied first, beside a row of padding; then all go on as if grown together."""
    prompts, more = random_prompts(5, 4), random_prompts(6, 4)
    cache = prefill(params, prompts)
    before = jax.tree.map(np.array, cache)
    chosen, counts = jnp.array([3, 1, 4], jnp.int32), jnp.array([3, 2, 3], jnp.int32)
    fresh = jnp.array([True, False, False])
    cache = extend(CONFIG, params, cache, more[jnp.array([3, 1, 0])], counts, fresh, chosen)
    assert cache.lengths.tolist() == [5, 7, 5, 3]
    untouched = np.array([0, 2])
    for then, now in zip(before.layers, cache.layers, strict=True):
        for a, b in zip(then, now, strict=True):
            np.testing.assert_array_equal(np.asarray(b)[untouched], a[untouched])
    whole = prefill(params, prompts)
    counts, fresh = jnp.array([0, 2, 0, 3], jnp.int32), jnp.array([False, False, False, True])
    whole = extend(CONFIG, params, whole, more, counts, fresh)
    np.testing.assert_allclose(cache.hidden, whole.hidden, atol=1e-5)
    _, a = sample_turn(params, cache, range(4))
    _, b = sample_turn(params, whole, range(4))
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_slots_can_be_copied_and_given_more_room(params):
    """A prompt prefilled once, copied to two slots of a roomier cache, goes on in each as if it had been prefilled there."""
    prompts = random_prompts(7, 2)
    shared = take_slots(prefill(params, prompts, capacity=8), jnp.array([1, 0, 1, 1], jnp.int32), 32)
    _, out = sample_turn(params, shared, range(4))
    _, alone = run(params, prompts[jnp.array([1, 0, 1, 1])], range(4))
    np.testing.assert_array_equal(out.tokens, alone.tokens)
    np.testing.assert_allclose(out.log_prob, alone.log_prob, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_prompt_is_copied_in_place(params, dtype):
    """Slot 1's tokens to slots 0 and 3: those two have what slot 1 has, the others what they had, and not even one slot's room
    is allocated."""
    slots, capacity, columns = 4, 64, 16
    cache = init_cache(CONFIG, slots, capacity, dtype)
    counts = jnp.array([3, 9, 5, 2], jnp.int32)
    cache = extend(CONFIG, params, cache, random_prompts(9, slots, 9), counts, jnp.ones(slots, bool))
    want = take_slots(cache, jnp.array([1, 1, 2, 1], jnp.int32), capacity)
    given = jnp.array([1, 1, 0], jnp.int32), jnp.array([0, 3, slots], jnp.int32)  # the last row is padding
    as_for_users = {"xla_cpu_use_fusion_emitters": True}
    memory = copy_slots.lower(cache, *given, columns).compile(compiler_options=as_for_users).memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == size and memory.temp_size_in_bytes < size / slots
    found = copy_slots(cache, *given, columns)
    np.testing.assert_array_equal(found.lengths, want.lengths)
    np.testing.assert_array_equal(found.hidden, want.hidden)
    for slot, count in enumerate(want.lengths.tolist()):
        for ours, theirs in zip(jax.tree.leaves(found.layers), jax.tree.leaves(want.layers), strict=True):
            axis = ours.shape[1:].index(capacity)
            np.testing.assert_array_equal(*(jnp.take(x[slot], jnp.arange(count), axis) for x in (ours, theirs)))


def test_members_of_a_sweep_are_mapped_over(params, max_traces):
    """vmap over a leading axis of params and cache gives what each member gives alone, from one trace."""
    members = [params, draw_params(1), draw_params(2)]
    prompts = random_prompts(8, 4)

    def play(params, cache):
        counts, fresh = jnp.full(4, 5, jnp.int32), jnp.ones(4, bool)
        cache = extend(CONFIG, params, cache, prompts, counts, fresh)
        return sample_turn(params, cache, range(4), stop=(3,))[1]

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    caches = jax.tree.map(lambda x: jnp.stack([x] * 3), init_cache(CONFIG, 4, 32))
    together = jax.jit(jax.vmap(play))(stacked, caches)
    for i, member in enumerate(members):
        _, alone = run(member, prompts, range(4), stop=(3,))
        np.testing.assert_array_equal(together.tokens[i], alone.tokens)
        np.testing.assert_array_equal(together.counts[i], alone.counts)
        np.testing.assert_allclose(together.log_prob[i], alone.log_prob, atol=1e-5)
    assert (together.tokens[0] != together.tokens[1]).any()


LOGITS = jnp.concatenate([jnp.array([1.0, 0.0, -1.0, 2.0, 0.5]), jnp.linspace(-2.0, 1.5, 95)])


def truncated(temperature, top_k, top_p):
    """The distribution in float64, token by token as the definition reads."""
    probs = np.asarray(jax.nn.softmax(LOGITS / temperature), np.float64)
    order = np.argsort(-probs, kind="stable")
    kept = order[: top_k or len(order)]
    mass = np.cumsum(probs[kept]) / probs[kept].sum()
    kept = kept[np.concatenate([[True], mass[:-1] < top_p])]
    out = np.zeros_like(probs)
    out[kept] = probs[kept]
    return out / out.sum()


@functools.cache
def draw(n=20_000):
    keys, logits = jax.random.split(jax.random.key(0), n), jnp.tile(LOGITS[None], (n, 1))
    return jax.jit(lambda how: sample(keys, logits, how)), n


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.5, 0, 1.0), (1.0, 0, 1.0), (2.0, 0, 1.0), (1.0, 7, 1.0), (1.5, 0, 0.6), (0.7, 20, 0.9), (1.0, 1, 1.0), (1.0, 0, 0.01)],
)
def test_sampled_tokens_follow_the_distribution(temperature, top_k, top_p):
    """Chi-square against the exact distribution, the support met in full and never left."""
    program, n = draw()
    tokens, log_prob, entropy = program(sampling(n, temperature, top_k, top_p))
    probs = truncated(temperature, top_k, top_p)
    support = np.flatnonzero(probs)
    counts = np.bincount(tokens, minlength=probs.size)
    assert set(np.flatnonzero(counts)) <= set(support)
    assert set(np.flatnonzero(probs * n > 20)) <= set(np.flatnonzero(counts))
    if len(support) > 1:
        assert stats.chisquare(counts[support], probs[support] * n).pvalue > 1e-3
    np.testing.assert_allclose(log_prob, np.log(probs[tokens]), atol=1e-5)
    np.testing.assert_allclose(entropy, -(probs[support] * np.log(probs[support])).sum(), atol=1e-5)


def test_every_row_has_its_own_distribution():
    """Rows of different settings side by side draw what they draw alone."""
    settings = [(0.5, 0, 1.0), (1.0, 7, 1.0), (1.5, 0, 0.6), (0.0, 5, 0.5)]
    keys = jax.random.split(jax.random.key(3), 4)
    temperature, top_k, top_p = (jnp.array(column) for column in zip(*settings, strict=True))
    mixed = Sampling(temperature, top_k, top_p)
    together = sample(keys, jnp.tile(LOGITS[None], (4, 1)), mixed)
    for i, how in enumerate(settings):
        alone = sample(keys[i : i + 1], LOGITS[None], sampling(1, *how))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b[0], atol=1e-6), together, alone)


def test_extreme_logits_give_no_token_without_probability():
    """One word holds all the mass that float32 can tell; others are -inf or underflow."""
    logits = jnp.full((64, 200), -1e4).at[:, 77].set(30.0).at[:, 5].set(-jnp.inf)
    tokens, log_prob, entropy = sample(jax.random.split(jax.random.key(4), 64), logits, sampling(64))
    assert (tokens == 77).all() and not log_prob.any() and not entropy.any()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (20, 1.0), (0, 0.5), (20, 0.7), (0, 1e-45)])
def test_no_uniform_draws_a_token_of_weight_zero(top_k, top_p):
    """Edges of the cumulative sum, a bit before and after them, and the ends of [0, 1)."""
    rows, vocabulary = 16, 40_000
    logits = 3.0 * jax.random.normal(jax.random.key(8), (rows, vocabulary))
    logits = logits.at[: rows // 2, vocabulary // 2 :].set(-jnp.inf)  # a row whose end has no weight
    how = sampling(rows, 1.0, top_k, top_p)
    weights = jax.jit(lambda x: jnp.exp(generate._truncated(x - x.max(axis=-1, keepdims=True), how)))(logits)
    drawn = jax.jit(lambda uniform: generate._drawn(uniform, weights)[0])
    edges = np.cumsum(np.asarray(weights, np.float64), axis=-1)
    near = (edges / edges[:, -1:]).astype(np.float32)
    near = np.take_along_axis(near, np.linspace(0, vocabulary - 1, 20).astype(int)[None], axis=1)
    near = np.concatenate([near, np.zeros((rows, 1), np.float32)], axis=1)
    for towards in (-1, 0, 1):
        for column in near.T:
            moved = np.nextafter(column, np.float32(towards)) if towards else column
            tokens = drawn(np.clip(moved, 0.0, np.nextafter(np.float32(1), np.float32(0))))
            assert (np.take_along_axis(np.asarray(weights), np.asarray(tokens)[:, None], axis=1) > 0).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (20, 0.9)])
def test_no_temperature_breaks_the_distribution(top_k, top_p):
    logits = (40.0 * jax.random.normal(jax.random.key(9), (60, 200))).at[:, :7].set(-jnp.inf)
    how = sampling(60, 1.0, top_k, top_p)._replace(temperature=jnp.tile(jnp.array([1e-45, 1e-38, 1e-30, 1e-3, 1e30, 3e38]), 10))
    tokens, log_prob, entropy = sample(jax.random.split(jax.random.key(4), 60), logits, how)
    assert np.isfinite(log_prob).all() and np.isfinite(entropy).all() and (tokens >= 7).all()


def test_temperature_zero_takes_the_likeliest_token():
    logits = jax.random.normal(jax.random.key(5), (50, 9))
    tokens, log_prob, _ = sample(jax.random.split(jax.random.key(6), 50), logits, sampling(50, temperature=0.0, top_p=0.3))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(log_prob, jax.nn.log_softmax(logits).max(-1), atol=1e-6)


def test_an_8_bit_cache_keeps_each_vector_to_half_a_step(params):
    """Written and read back: no number is off by more than half of its vector's largest magnitude over 127."""
    prompts = random_prompts(9, 4)
    counts, fresh, cache = jnp.full(4, 5, jnp.int32), jnp.ones(4, bool), {}
    for dtype in (None, "int8"):
        cache[dtype] = extend(CONFIG, params, init_cache(CONFIG, 4, 32, dtype), prompts, counts, fresh)
    # The first layer reads no cache, so what it writes is the same.
    keys, values = kv_cache.read(cache[None].layers[0], None, jnp.dtype("float32"))
    small = kv_cache.read(cache["int8"].layers[0], None, jnp.dtype("float32"))
    for exact, rounded, axis in ((keys, small[0], 2), (values, small[1], 3)):
        step = jnp.abs(exact).max(axis=axis, keepdims=True) / 127
        assert (jnp.abs(exact - rounded) <= 0.501 * step + 1e-12).all()
    assert cache["int8"].layers[0][0].dtype == jnp.int8
    moved = take_slots(cache["int8"], jnp.array([3, 0, 1, 2], jnp.int32), 64)
    _, a = sample_turn(params, moved, [3, 0, 1, 2])
    _, b = sample_turn(params, cache["int8"], range(4))
    np.testing.assert_array_equal(a.tokens, b.tokens[jnp.array([3, 0, 1, 2])])
