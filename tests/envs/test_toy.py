"""The toy game: its optimum is what it says."""

import itertools

import pytest

from epo_jax.envs import toy


def test_every_door_is_there_once():
    tasks = toy.list_tasks("train", {})
    assert len({task["id"] for task in tasks}) == len(tasks) == 30
    halves = [toy.list_tasks(split, {}) for split in ("valid_seen", "valid_unseen")]
    assert [len(half) for half in halves] == [15, 15]
    assert {task["id"] for half in halves for task in half} == {task["id"] for task in tasks}


@pytest.mark.parametrize("task", toy.list_tasks("train", {}), ids=lambda task: task["id"])
def test_exactly_one_pair_of_answers_wins(task):
    returns = {}
    for answers in itertools.product(toy.COLOURS, toy.DIGITS):
        env = toy.make_env({})
        env.reset(task)
        seen = [env.step(answer) for answer in answers]
        assert [observation.done for observation in seen] == [False, True]
        returns[answers] = sum(observation.reward for observation in seen)
    assert returns.pop((task["colour"], task["digit"])) == 10.0
    assert set(returns.values()) == {0.0}


def test_answers_can_be_read_and_demonstrations_win():
    for demo in toy.demonstrations(toy.list_tasks("train", {}), {}):
        assert demo.won and len(demo.observations) == len(demo.actions) + 1 == 3
        for observation, action in zip(demo.observations, demo.actions, strict=False):
            assert action in observation.text
