"""Prompts and the reading of actions: the contract, case by case."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epo_jax.envs import agent
from epo_jax.envs.agent import ParsedAction, parse_action
from epo_jax.envs.base import Observation

SEEN = Observation(text="You see a {box} and 100%.", goal="open it.", admissible=("open box 1", "look"))

THOUGHT = "<think>it is closed</think>"
TAGGED = {
    "plain": (f"{THOUGHT}<action>open box 1</action>", "open box 1", True),
    "case and blanks": ("<THINK>a</Think>\n<Action>  Open \n\t BOX 1 </ACTION>\n", "open box 1", True),
    "several: the last": (f"{THOUGHT}<action>look</action><action>open box 1</action>", "open box 1", True),
    "last is not complete": (f"{THOUGHT}<action>look</action> no, <action>open bo", "look", True),
    "unclosed before closed": (f"{THOUGHT}<action>lo<action>open box 1</action>", "open box 1", True),
    "mentioned while thinking": ("<think>maybe <action>look</action></think><action>wait</action>", "wait", True),
    "no thought": ("<action>look</action>", "look", False),
    "thought cut off": ("<think>hm <action>look</action>", "look", False),
    "no action": ("I open the box.", "", False),
    "truncated": (f"{THOUGHT}<action>open box", "", False),
    "closed only": (f"{THOUGHT}open box</action>", "", False),
    "empty": (f"{THOUGHT}<action> \n </action>", "", False),
    "nothing": ("", "", False),
    "other script in the thought": ("<think>打开</think><action>look</action>", "look", False),
    "other script in the action": (f"{THOUGHT}<action>открой box</action>", "открой box", False),
    "accents, dashes, emoji are fine": ("<think>café – ok 👍</think><action>look</action>", "look", True),
    "control characters": (f"{THOUGHT}<action>open\x00box\x1b 1</action>", "open box 1", True),
    "too long": (f"{THOUGHT}<action>{'a' * 300}</action>", "a" * 256, False),
    "as long as allowed": (f"{THOUGHT}<action>{'a' * 256}</action>", "a" * 256, True),
}
BARE = {
    "plain": ("Open box 1\n", "open box 1", True),
    "tags are text": ("<action>look</action>", "<action>look</action>", True),
    "empty": (" \n", "", False),
    "two lines": ("open box 1\nlook", "open box 1 look", True),
    "other script": ("看 look", "看 look", False),
    "too long": ("ab " * 200, ("ab " * 200)[:256].strip(), False),
}


@pytest.mark.parametrize("answer, action, valid", TAGGED.values(), ids=TAGGED.keys())
def test_tagged_answers(answer, action, valid):
    assert parse_action(answer, tags=True) == ParsedAction(action, valid)


@pytest.mark.parametrize("answer, action, valid", BARE.values(), ids=BARE.keys())
def test_bare_answers(answer, action, valid):
    assert parse_action(answer, tags=False) == ParsedAction(action, valid)


@given(st.text() | st.text(alphabet="<>/actionhk "), st.booleans())
def test_any_answer_gives_one_clean_line(answer, tags):
    action, valid = parse_action(answer, tags)
    assert len(action) <= agent.MAX_ACTION_CHARS
    assert action == action.strip() and not any(char < " " for char in action)
    assert action or not valid


def test_long_answers_of_half_tags_take_linear_time():
    started = time.process_time()
    for piece in ("<action>", "<think>", "</action>", "<action></think>"):
        parse_action(piece * 20_000, tags=True)
    assert time.process_time() - started < 1.0


def test_bare_messages_are_the_observations():
    assert agent.first_message(SEEN, "bare") == "You see a {box} and 100%.\nopen it."
    assert agent.next_message(SEEN, "bare") == "You see a {box} and 100%."


def test_tagged_messages_hold_the_fields():
    first, following = agent.first_message(SEEN, "tagged"), agent.next_message(SEEN, "tagged")
    for message in (first, following):
        for part in (SEEN.text, "open box 1, look", "<think>", "</think>", "<action>", "</action>"):
            assert part in message
    assert SEEN.goal in first and SEEN.goal not in following


def test_tagged_messages_name_the_forms_of_commands():
    observation = Observation(text="a room", goal="find it", commands="open OBJ, wait")
    message = agent.first_message(observation, "tagged")
    assert "open OBJ, wait" in message and "work now" not in message
