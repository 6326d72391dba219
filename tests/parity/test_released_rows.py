"""The release's turn rows: which there are, which are copied, and what their tokens weigh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives import entropy
from epo_jax.parity import released_rows

TOKENS = jnp.array([3, 1, 0, 2, 4, 1, 0, 0, 2, 5])  # of ten possible turns, three of which never came
PLAYED = [0, 1, 3, 4, 5, 8, 9]


def rows_of(rows):
    """The live rows: (turns, mini-batches, micro-batches)."""
    live = np.asarray(rows.live) > 0
    return tuple(np.asarray(x)[live].tolist() for x in (rows.key, rows.mini, rows.micro))


@pytest.mark.parametrize("mini_turns, micro_turns, size", [(1, 1, 7), (4, 2, 8), (3, 3, 9), (7, 1, 7), (12, 4, 12), (20, 5, 20)])
def test_the_batch_is_filled_with_copies_and_cut_wherever_it_comes(mini_turns, micro_turns, size):
    turns, mini, micro = rows_of(released_rows.turn_rows(TOKENS, mini_turns, micro_turns, jax.random.key(0)))
    assert turns[:7] == PLAYED and len(turns) == size
    copies = turns[7:]
    assert set(copies) <= set(PLAYED)
    assert len(set(copies)) == min(len(copies), 7), "a turn was copied twice before all were once"
    assert mini == [i // mini_turns for i in range(size)]
    assert micro == [i // micro_turns for i in range(size)]


def test_copies_are_drawn_at_random():
    drawn = {tuple(rows_of(released_rows.turn_rows(TOKENS, 10, 5, jax.random.key(k)))[0]) for k in range(20)}
    assert len(drawn) > 5


def test_weights_are_the_mean_over_micro_batches_of_their_token_means():
    x = jnp.arange(10.0)  # a value that all tokens of a turn share
    rows = released_rows.turn_rows(TOKENS, 6, 2, jax.random.key(4))
    weights = released_rows.turn_weights(rows, TOKENS, 6, 2)
    turns, _, micro = map(np.array, rows_of(rows))
    means = [np.average(x[turns[micro == i]], weights=TOKENS[turns[micro == i]]) for i in range(6)]
    np.testing.assert_allclose((weights * (TOKENS * x)[None]).sum(1), np.reshape(means, (2, 3)).mean(1), rtol=1e-5)


@pytest.mark.parametrize("tokens", [TOKENS, jnp.zeros_like(TOKENS)])
def test_a_mini_batch_without_turns_weighs_nothing(tokens):
    weights = released_rows.turn_weights(released_rows.turn_rows(tokens, 3, 3, jax.random.key(0)), tokens, 3, 3)
    live = -(-int((tokens > 0).sum()) // 3)
    assert jnp.isfinite(weights).all() and (weights[:live].sum(1) > 0).all() and not weights[live:].any()


def test_the_history_is_right_aligned_and_its_zeros_count():
    """No episode came to turn 2: turn 0's entropy lands where turn 1's belongs (fault 4)."""
    history = entropy.init_history(4, 3)
    for mean, observed in (([1.0, 2.0, 0.0], [1.0, 1.0, 0.0]), ([4.0, 5.0, 6.0], [1.0, 1.0, 1.0])):
        history = entropy.append(history, *released_rows.left_padded(jnp.array(mean), jnp.array(observed)))
    np.testing.assert_allclose(entropy.center(history).value, [2.0, 3.0, 4.0])
