"""Metrics of hand-made episodes, worked out with plain lists."""

import math
import statistics

import pytest

from epo_jax.rollout.trajectory import Trajectory
from epo_jax.training.episode_metrics import (
    action_information,
    early_and_late_entropy,
    entropy_by_turn,
    entropy_spread,
    policy_tokens,
    repeated_actions,
)


def episode(entropies, actions=None, task="a"):
    """An episode whose turns have these tokens' entropies; prompts, whose entropy is recorded as 0, count nowhere."""
    t = Trajectory(task={"id": task, "type": "t"})
    for turn, values in enumerate(entropies):
        t.append_prompt([7, 8], new_context=turn % 2 == 0)
        t.append_answer([9] * len(values), [0.0] * len(values), list(values))
        t.actions.append(actions[turn] if actions else "go")
    return t


def first_actions(**tasks):
    return [episode([[1.0], [2.0]], [action, "look"], task) for task, actions in tasks.items() for action in actions]


EMPTY = Trajectory(task={"id": "c", "type": "t"})


def test_entropy_by_turn_is_a_mean_over_tokens():
    """Turn 1 of one episode only."""
    assert entropy_by_turn(policy_tokens([episode([[1.0, 2.0], [0.5]]), episode([[6.0]])])) == {0: 3.0, 1: 0.5}
    assert entropy_by_turn(policy_tokens([EMPTY])) == {}


def test_early_and_late_turns_are_the_first_and_last_ten_of_each_episode():
    long = [[float(turn), float(turn) + 0.5][: 1 + turn % 2] for turn in range(13)]
    short = [[40.0], [50.0, 60.0]]
    found = early_and_late_entropy(policy_tokens([episode(long), episode(short), EMPTY]))
    early, late = sum(long[:10] + short, []), sum(long[3:] + short, [])
    assert found == pytest.approx({"entropy_first_turns": statistics.mean(early), "entropy_last_turns": statistics.mean(late)})
    assert found["entropy_first_turns"] != found["entropy_last_turns"]
    whole = early_and_late_entropy(policy_tokens([episode(long[:10])]))
    assert len(set(whole.values())) == 1
    assert set(early_and_late_entropy(policy_tokens([EMPTY])).values()) == {None}


def test_spread_of_tokens_and_of_the_means_of_episodes():
    found = entropy_spread(policy_tokens([episode([[1.0, 2.0], [6.0]]), EMPTY, episode([[0.5]]), episode([[2.0], [4.0]])]))
    assert found["entropy_std_tokens"] == pytest.approx(statistics.pstdev([1.0, 2.0, 6.0, 0.5, 2.0, 4.0]))
    assert found["entropy_std_episodes"] == pytest.approx(statistics.pstdev([3.0, 0.5, 3.0]))


def test_a_policy_that_does_not_read_its_task_has_no_information_about_it():
    """Four episodes of each task with the same two actions: the shares have ln 2, and the correction is 1/8 and 1/16."""
    found = action_information(first_actions(a=["go", "eat"] * 2, b=["go", "eat"] * 2))
    assert found["action_entropy_given_task"] == pytest.approx(math.log(2) + 1 / 8)
    assert found["task_action_information"] == pytest.approx(1 / 16 - 1 / 8)


def test_a_policy_with_one_action_for_each_task_has_all_information_about_it():
    found = action_information(first_actions(a=["go"] * 3, b=["eat"] * 3, c=["take"] * 3))
    assert found["action_entropy_given_task"] == 0.0
    assert found["task_action_information"] == pytest.approx(math.log(3) + 2 / 18)


def test_tasks_count_by_their_episodes_and_those_played_once_not_at_all():
    episodes = first_actions(a=["go", "go", "go", "eat"], b=["take", "eat"], c=["sleep"])
    found = action_information([*episodes, EMPTY])
    a = 0.75 * math.log(4 / 3) + 0.25 * math.log(4) + 1 / 8
    b = math.log(2) + 1 / 4
    whole = 3 / 6 * math.log(2) + 2 / 6 * math.log(3) + 1 / 6 * math.log(6) + 2 / 12
    assert found["action_entropy_given_task"] == pytest.approx((4 * a + 2 * b) / 6)
    assert found["task_action_information"] == pytest.approx(whole - (4 * a + 2 * b) / 6)


def test_without_a_task_played_twice_there_is_nothing_to_measure():
    found = action_information(first_actions(a=["go"], b=["eat"]))
    assert found == {"action_entropy_given_task": None, "task_action_information": None}


def test_repeated_actions_are_those_that_their_episode_took_before():
    """Three of eight turns; two turns without an action repeat none, and neither does the second episode the first."""
    first = episode([[1.0]] * 6, ["go", "go", "eat", "go", "", ""])
    assert repeated_actions([first, episode([[1.0]] * 2, ["eat", "eat"])]) == 3 / 8
    assert repeated_actions([EMPTY]) is None
