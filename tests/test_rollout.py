"""The turn scheduler: the same trajectories whatever the timing, and every limit kept."""

import dataclasses

import jax
import numpy as np
import pytest

from epo_jax import rollout
from epo_jax.envs import agent, toy
from epo_jax.envs.pool import EnvPool
from epo_jax.models import generate
from epo_jax.models.decoder import DecoderConfig, init_params
from epo_jax.models.tokenizer import train_tokenizer
from epo_jax.trajectory import Trajectory

OPTIONS = {"name": "toy"}
TASKS = toy.list_tasks("train", OPTIONS)
TOKENIZER = train_tokenizer([f"red blue green {i} {toy.GOAL} you see a door. the number is" for i in range(10)], 400)
MODEL = DecoderConfig(TOKENIZER.vocab_size, 16, 1, 2, 1, 8, 16)
SETTINGS = rollout.RolloutConfig(
    slots=8, max_turns=2, max_tokens=160, max_policy_tokens=64, response_tokens=5, style="bare"
)
EPISODES = [rollout.Episode(100 + i, TASKS[i // 2], i // 2) for i in range(14)]


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


def play(params, workers=1, settings=SETTINGS, episodes=EPISODES, key=0):
    with EnvPool("toy", OPTIONS, workers) as pool:
        return rollout.collect(episodes, pool, TOKENIZER, MODEL, params, jax.random.key(key), settings, 1.0)


def ids(trajectories):
    return [t.tokens for t in trajectories]


def test_worker_count_and_slots_do_not_change_the_trajectories(params):
    want = ids(play(params)[0])
    assert ids(play(params, workers=3)[0]) == want
    for slots in (2, 14):
        assert ids(play(params, settings=dataclasses.replace(SETTINGS, slots=slots))[0]) == want
    assert ids(play(params, key=1)[0]) != want


def test_an_episode_does_not_depend_on_its_companions(params):
    want = ids(play(params)[0])
    assert ids(play(params, episodes=EPISODES[5:8])[0]) == want[5:8]


def test_a_trajectory_is_what_was_said(params):
    trajectories, stats = play(params)
    for episode, t in zip(EPISODES, trajectories, strict=True):
        assert (t.task, t.group) == (episode.task, episode.group)
        assert len(t.tokens) == len(t.turn) == len(t.log_prob) == len(t.entropy)
        assert len(t.actions) == len(t.rewards) == len(t.valid) == 2 and len(t.observations) == 3
        assert t.tokens[: len(TOKENIZER.first("x")) - 1]
        opening = TOKENIZER.first(f"{t.observations[0]}\n{toy.GOAL}")
        assert t.tokens[: len(opening)] == opening and t.turn[: len(opening)] == [-1] * len(opening)
        for turn, action in enumerate(t.actions):
            said = [token for token, at in zip(t.tokens, t.turn, strict=True) if at == turn]
            assert 1 <= len(said) <= SETTINGS.response_tokens
            assert agent.parse_action(TOKENIZER.decode(said), tags=False).action == action
        policy = np.array(t.turn) >= 0
        assert (np.array(t.log_prob)[policy] < 0).all() and not np.array(t.log_prob)[~policy].any()
        assert t.won == (sum(t.rewards) == 10.0) and not t.truncated
    assert stats.policy_tokens == sum(t.num_policy_tokens for t in trajectories) and stats.env_steps == 28


def test_turn_and_token_limits_end_an_episode(params):
    one_turn, _ = play(params, settings=dataclasses.replace(SETTINGS, max_turns=1))
    assert all(len(t.actions) == 1 and t.truncated and not t.won for t in one_turn)
    opening = max(len(t.tokens) for t in one_turn)
    tight = dataclasses.replace(SETTINGS, max_tokens=opening + 6)
    cut, _ = play(params, settings=tight)
    assert all(len(t.tokens) <= opening + 6 for t in cut) and any(t.truncated for t in cut)
    silent, _ = play(params, settings=dataclasses.replace(SETTINGS, max_policy_tokens=8))
    assert all(t.num_policy_tokens <= 8 for t in silent) and any(t.truncated for t in silent)


def test_fault_6_a_finished_episode_generates_nothing(params):
    """Episodes of one and of two turns side by side: the short ones cost no tokens after their end."""
    lengths = [len(t.tokens) for t in play(params)[0]]
    tight = dataclasses.replace(SETTINGS, max_tokens=max(lengths) - 1)
    trajectories, stats = play(params, settings=tight)
    turns = [len(t.actions) for t in trajectories]
    assert set(turns) == {1, 2}, "the token budget no longer ends some episodes early: choose another"
    assert stats.env_steps == sum(turns)
    assert stats.policy_tokens == sum(t.num_policy_tokens for t in trajectories)


def test_a_second_rollout_compiles_nothing(params, max_traces):
    play(params)
    max_traces(generate.decode, 0)
    max_traces(generate.extend, 0)
    play(params, key=5)


def won(group, *returns):
    return [Trajectory(task=TASKS[group], group=group, rewards=[0.0, r]) for r in returns]


def test_uniform_groups_give_way_to_those_of_later_rounds():
    first = [*won(0, 10.0, 10.0), *won(1, 0.0, 10.0), *won(2, 0.0, 0.0)]
    chosen, uniform = rollout.choose_groups([first], 3)
    assert chosen == first and uniform == 2
    second = [*won(0, 0.0, 0.0), *won(1, 0.0, 10.0), *won(2, 0.0, 0.0)]
    chosen, uniform = rollout.choose_groups([first, second], 3)
    assert [t.rewards[1] for t in chosen] == [10.0, 10.0, 0.0, 10.0, 0.0, 10.0] and uniform == 1
    assert [t.group for t in chosen] == [0, 0, 1, 1, 2, 2]
    third = [*won(0, 10.0, 0.0), *won(1, 0.0, 10.0), *won(2, 0.0, 0.0)]
    chosen, uniform = rollout.choose_groups([first, second, third], 3)
    assert [t.rewards[1] for t in chosen] == [0.0, 10.0, 0.0, 10.0, 10.0, 0.0] and uniform == 0


def test_the_cost_of_rounds_adds_up():
    total = rollout.RolloutStats(seconds=1.0, env_steps=2) + rollout.RolloutStats(seconds=0.5, env_steps=3)
    assert total == rollout.RolloutStats(seconds=1.5, env_steps=5)
