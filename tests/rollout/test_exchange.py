"""The exchange of trajectories: every number arrives as it was, in the order of the episodes, and observations stay at home."""

import concurrent.futures
import dataclasses
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epo_jax.parallel import hosts
from epo_jax.rollout import exchange
from epo_jax.rollout.episode import Episode
from epo_jax.rollout.trajectory import Trajectory

STATISTIC, ID, FLOAT = st.floats(width=32), st.integers(0, 2**31 - 1), st.floats()


@st.composite
def trajectories(draw, episode):
    """Of any number of turns, none included, in one context or several; numbers may be infinite or not a number."""
    t = Trajectory(episode.task, episode.group, episode.id, goal=draw(st.text()), score=draw(FLOAT))
    t.won, t.truncated, t.full = (draw(st.booleans()) for _ in range(3))
    t.won_reference = draw(st.none() | st.booleans())
    for _ in range(draw(st.integers(0, 4))):
        t.append_observation(draw(st.text()))
        t.append_prompt(draw(st.lists(ID, max_size=7)), new_context=draw(st.booleans()))
        answer = draw(st.lists(st.tuples(ID, STATISTIC, STATISTIC), max_size=5))
        t.append_answer(*([column[i] for column in answer] for i in range(3)))
        t.actions.append(draw(st.text()))
        t.valid.append(draw(st.booleans()))
        t.rewards.append(draw(FLOAT))
    t.append_observation(draw(st.text()))
    return t


def bits(t):
    """The fields of a trajectory, of which nan equals nan, and -0.0 does not equal 0.0."""
    return repr({name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(t).items()})


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 7), st.integers(2, 4))
def test_numbers_of_all_processes_arrive_bit_for_bit(data, count, processes):
    """With fewer episodes than processes, some play none."""
    episodes = [Episode(3 * i, {"id": f"é{i}", "type": "t"}, i // 2) for i in range(count)]
    played = [data.draw(trajectories(episode)) for episode in episodes]
    shares = [range(count * p // processes, count * (p + 1) // processes) for p in range(processes)]
    results = in_threads(processes, lambda p: exchange.of_all_processes(episodes, [played[i] for i in shares[p]]))
    for share, together in zip(shares, results, strict=True):
        expected = [t if i in share else dataclasses.replace(t, goal="", observations=[]) for i, t in enumerate(played)]
        assert list(map(bits, together)) == list(map(bits, expected))
        assert all(together[i] is played[i] for i in share)


def in_threads(processes, function):
    """`function(p)` for each process p; threads act as processes, and exchange what they gather."""
    here, barrier, sent = threading.local(), threading.Barrier(processes, timeout=20), [None] * processes

    def gather(message):
        sent[here.process] = message
        barrier.wait()
        received = list(sent)
        barrier.wait()
        return received

    def act(process):
        here.process = process
        return function(process)

    with pytest.MonkeyPatch.context() as patch, concurrent.futures.ThreadPoolExecutor(processes) as executor:
        patch.setattr(jax, "process_count", lambda: processes)
        patch.setattr(jax, "process_index", lambda: here.process)
        patch.setattr(hosts, "gather_bytes", gather)
        return list(executor.map(act, range(processes)))
