"""The release's turn rows: which there are, which are copied, and what their tokens weigh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives import entropy, released_rows

TOKENS = jnp.array([3, 1, 0, 2, 4, 1, 0, 0, 2, 5])  # of ten possible turns, three of which never came
MINI = jnp.array([1, 1, 1, 0, 0, 0, 0, 1, 1, 0])


def rows_of(rows, m):
    """The turns in mini-batch m, in order, with their micro-batches."""
    here = (np.asarray(rows.live) > 0) & (np.asarray(rows.mini) == m)
    return np.asarray(rows.key)[here].tolist(), np.asarray(rows.micro)[here].tolist()


@pytest.mark.parametrize("micro_turns, sizes", [(1, (4, 3)), (3, (6, 3)), (4, (4, 4)), (9, (9, 9))])
def test_each_mini_batch_is_filled_with_copies_of_its_own_turns(micro_turns, sizes):
    rows = released_rows.turn_rows(TOKENS, MINI, 2, micro_turns, jax.random.key(0))
    for m, (originals, size) in enumerate(zip(([3, 4, 5, 9], [0, 1, 8]), sizes, strict=True)):
        turns, micro = rows_of(rows, m)
        assert len(turns) == size and size % micro_turns == 0
        assert turns[: len(originals)] == originals
        copies = turns[len(originals) :]
        assert set(copies) <= set(originals)
        assert len(set(copies)) == min(len(copies), len(originals)), "a turn was copied twice before all were once"
        assert micro == [i // micro_turns for i in range(size)]


def test_copies_are_drawn_at_random():
    drawn = {tuple(rows_of(released_rows.turn_rows(TOKENS, MINI, 2, 3, jax.random.key(k)), 0)[0]) for k in range(20)}
    assert len(drawn) > 5


def test_weights_are_the_mean_over_micro_batches_of_their_token_means():
    x = jnp.arange(10.0)  # a value that all tokens of a turn share
    rows = released_rows.turn_rows(TOKENS, MINI, 2, 3, jax.random.key(4))
    weights = released_rows.turn_weights(rows, TOKENS, 2)
    for m in range(2):
        turns, micro = map(np.array, rows_of(rows, m))
        means = [np.average(x[turns[micro == i]], weights=TOKENS[turns[micro == i]]) for i in set(micro)]
        found = (weights * TOKENS * x)[MINI == m].sum()
        np.testing.assert_allclose(found, np.mean(means), rtol=1e-5)


def test_a_mini_batch_without_turns_weighs_nothing():
    rows = released_rows.turn_rows(TOKENS, jnp.zeros_like(MINI), 2, 3, jax.random.key(0))
    assert rows_of(rows, 1) == ([], [])
    assert jnp.isfinite(released_rows.turn_weights(rows, TOKENS, 2)).all()


def test_the_history_is_right_aligned_and_its_zeros_count():
    """No episode came to turn 2: turn 0's entropy lands where turn 1's belongs (fault 4)."""
    history = entropy.init_history(4, 3)
    for mean, observed in (([1.0, 2.0, 0.0], [1.0, 1.0, 0.0]), ([4.0, 5.0, 6.0], [1.0, 1.0, 1.0])):
        history = entropy.append(history, *released_rows.left_padded(jnp.array(mean), jnp.array(observed)))
    np.testing.assert_allclose(entropy.center(history).value, [2.0, 3.0, 4.0])
