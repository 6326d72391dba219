"""Streams of random numbers: no purpose of any seed draws with the key of another."""

import itertools

import jax
import numpy as np

from epo_jax.common import keys

PURPOSES = ("weights", "embedding", "adapters", "rollout", "evaluation", "learner")


def test_no_two_purposes_and_seeds_share_a_key():
    """Seeds next to each other: an offset to the seed would make one's weights and another's rollouts the same key."""
    of_all = {
        (seed, purpose): tuple(jax.random.key_data(keys.key(seed, purpose)).tolist())
        for seed, purpose in itertools.product(range(6), PURPOSES)
    }
    assert len(set(of_all.values())) == len(of_all)


def test_a_traced_seed_has_the_key_of_its_value():
    traced = jax.jit(lambda seed: jax.random.key_data(keys.key(seed, "learner")))
    for seed in (7, 2**32 - 1):  # the largest that a config may have
        np.testing.assert_array_equal(traced(np.uint32(seed)), jax.random.key_data(keys.key(seed, "learner")))


def test_streams_of_the_host_differ_by_purpose_and_index_and_repeat():
    which = (0, "tasks", 0), (0, "tasks", 1), (0, "resampling", 0), (1, "tasks", 0)
    draws = [keys.generator(*each).random() for each in which]
    assert len(set(draws)) == 4
    assert keys.generator(0, "tasks", 1).random() == draws[1]
