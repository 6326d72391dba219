"""Packing: every token arrives where the learner looks for it."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from epo_jax.rollout.packing import BatchShape, cut_by_turn, first_fit, pack
from epo_jax.rollout.trajectory import Trajectory, choose_groups


def make(rng, turns, group=0, window=False):
    trajectory = Trajectory(task={"id": "t", "type": "t"}, group=group)
    for turn in range(turns):
        trajectory.append_prompt(rng.integers(1, 50, rng.integers(1, 6)).tolist(), new_context=window)
        n = int(rng.integers(1, 4))
        trajectory.append_answer(rng.integers(1, 50, n).tolist(), (-rng.random(n)).tolist(), rng.random(n).tolist())
        trajectory.append_observation(f"room {turn % 2}")
        trajectory.actions.append("go")
        trajectory.rewards.append(float(turn))
        trajectory.valid.append(turn % 2 == 0)
    return trajectory


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(1, 3), st.integers(0, 999), st.booleans(), st.booleans())
def test_every_policy_token_is_found_again(turns, mini_batches, seed, window, by_turn):
    rng = np.random.default_rng(seed)
    trajectories = [make(rng, n, window=window) for n in turns]
    order = rng.permutation(len(trajectories))
    # With a window, up to five contexts of at most 8 tokens and 3 of the policy each.
    shape = BatchShape(18, 6, 5, mini_batches, 2, 5, 2) if window else BatchShape(50, 20, 5, mini_batches, 2)
    if by_turn:
        mini_turns = 2 * mini_batches
        mini_batches = -(-5 * len(turns) // mini_turns)
        shape = dataclasses.replace(shape, mini_batches=mini_batches, mini_turns=mini_turns)
    batch = pack(trajectories, shape, order)
    seen = {i: [] for i in range(len(trajectories))}
    assert len(batch.rows) == mini_batches
    for m in range(mini_batches):
        assert not batch.segment_ids[m, batch.rows[m] :].any()
        for r in range(batch.rows[m]):
            for p in np.flatnonzero(batch.policy_mask[m, r]):
                column = batch.index[m, r, p] + 1
                assert batch.tokens[m, r, column] == batch.label[m, r, p]
                # The hidden state that predicts it belongs to the same trajectory, one position earlier.
                assert batch.segment_ids[m, r, column] == batch.segment_ids[m, r, column - 1] > 0
                assert batch.positions[m, r, column] == batch.positions[m, r, column - 1] + 1
                at = m, r, p
                owner = int(batch.trajectory[at])
                start = trajectories[owner].starts[int(batch.turn[at]) if window else 0]
                seen[owner].append(
                    (start + batch.positions[m, r, column], batch.turn[at], batch.reward[at], batch.valid[at],
                     batch.behaviour_log_prob[at], batch.behaviour_entropy[at])
                )  # fmt: skip
    for i, t in enumerate(trajectories):
        seen[i].sort()
        where = [p for p, turn in enumerate(t.turn) if turn >= 0]
        assert [s[0] for s in seen[i]] == where
        assert [s[1] for s in seen[i]] == [t.turn[p] for p in where]
        assert np.isclose(sum(s[2] for s in seen[i]), sum(t.rewards)) and batch.returns[i] == sum(t.rewards)
        assert [s[3] for s in seen[i]] == [float(t.valid[t.turn[p]]) for p in where]
        np.testing.assert_allclose([s[4] for s in seen[i]], [t.log_prob[p] for p in where], rtol=1e-6)
        np.testing.assert_allclose([s[5] for s in seen[i]], [t.entropy[p] for p in where], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 12), st.booleans())
def test_mini_batches_by_turn_are_few_and_alike(turns, most, single):
    turns = [1] * len(turns) if single else turns
    cut = cut_by_turn(turns, most)
    assert [c for mini_batch in cut for c in mini_batch] == [*range(len(turns))]
    counted = [max(n, 1) for n in turns]
    sizes = [sum(counted[c] for c in mini_batch) for mini_batch in cut]
    assert len(sizes) == -(-sum(counted) // most)
    assert max(map(len, cut), default=0) <= most
    assert max(sizes, default=0) < most + max([*counted, 0]) or single
    if single and sizes:
        assert max(sizes) <= most and max(sizes) - min(sizes) <= 1


def test_shapes_do_not_depend_on_lengths():
    rng = np.random.default_rng(0)
    short = pack([make(rng, 1) for _ in range(6)], BatchShape(50, 20, 5, 2, 4))
    long = pack([make(rng, 5) for _ in range(6)], BatchShape(50, 20, 5, 2, 4))
    assert [x.shape for x in short] == [x.shape for x in long]
    assert short.tokens.shape == (2, 4, 50)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(1, 3), st.integers(0, 999), st.booleans(), st.data())
def test_processes_fill_their_own_rows_and_together_the_batch(turns, epochs, seed, window, data):
    rng = np.random.default_rng(seed)
    trajectories = [make(rng, n, window=window) for n in turns]
    shape = BatchShape(18, 6, 5, 2, 2, 5, 2) if window else BatchShape(50, 20, 5, 2, 2)
    orders = np.stack([rng.permutation(len(turns)) for _ in range(epochs)])
    whole = pack(trajectories, shape, orders, seed)
    owner = np.array(data.draw(st.lists(st.integers(0, 2), min_size=(rows := shape.rows(len(turns))), max_size=rows)))
    parts = [pack(trajectories, shape, orders, seed, set(np.flatnonzero(owner == process))) for process in range(3)]
    for name, expected in whole._asdict().items():
        for process, part in enumerate(parts):
            has_rows = expected.ndim == 3  # [M, R, T] or [M, R, P]
            mine = np.where((owner == process)[:, None], expected, 0) if has_rows else expected
            np.testing.assert_array_equal(getattr(part, name), mine, err_msg=name)


def test_first_fit_respects_both_capacities_and_wastes_no_bin():
    bins = first_fit([(6, 1), (5, 1), (4, 1), (3, 3), (2, 3)], (10, 4))
    assert sorted(i for content in bins for i in content) == [0, 1, 2, 3, 4]
    assert len(bins) == 2 or len(bins) == 3
    for content in bins:
        assert sum([6, 5, 4, 3, 2][i] for i in content) <= 10
        assert sum([1, 1, 1, 3, 3][i] for i in content) <= 4


def test_anchors_are_equal_exactly_where_group_and_observation_are():
    rng = np.random.default_rng(1)
    trajectories = [make(rng, 3, group=0), make(rng, 3, group=0), make(rng, 3, group=1)]
    anchor = pack(trajectories, BatchShape(50, 20, 5)).anchor
    assert anchor[0, 0] == anchor[0, 2] == anchor[1, 0] != anchor[0, 1]
    assert anchor[2, 0] not in anchor[:2, :3]
    assert anchor.max() < anchor.size


def won(group, *returns):
    return [Trajectory(task={"id": "t", "type": "t"}, group=group, rewards=[0.0, r]) for r in returns]


def test_uniform_groups_give_way_to_those_of_later_rounds():
    first = [*won(0, 10.0, 10.0), *won(1, 0.0, 10.0), *won(2, 0.0, 0.0)]
    chosen, uniform = choose_groups([first], 3)
    assert chosen == first and uniform == 2
    second = [*won(0, 0.0, 0.0), *won(1, 0.0, 10.0), *won(2, 0.0, 0.0)]
    chosen, uniform = choose_groups([first, second], 3)
    assert [t.rewards[1] for t in chosen] == [10.0, 10.0, 0.0, 10.0, 0.0, 10.0] and uniform == 1
    assert [t.group for t in chosen] == [0, 0, 1, 1, 2, 2]
    third = [*won(0, 10.0, 0.0), *won(1, 0.0, 10.0), *won(2, 0.0, 0.0)]
    chosen, uniform = choose_groups([first, second, third], 3)
    assert [t.rewards[1] for t in chosen] == [0.0, 10.0, 0.0, 10.0, 10.0, 0.0] and uniform == 0
