"""Prompts and the reading of actions: the contract, case by case."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epo_jax.envs import agent
from epo_jax.envs.agent import ParsedAction, Window, parse_action, window_message
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
    "signs of physics are fine": ("<think>20 ºC, 3ª, 5 µA and 7 Ω; Δt in μs, ρ, Å, ℓ</think><action>look</action>", "look", True),
    "half-width and full-width Latin": ("<think>ｌｏｏｋ ﬁrst</think><action>look</action>", "look", True),
    "other script as one letter": ("<think>ж</think><action>look</action>", "look", False),
    "accents, dashes, emoji are fine": ("<think>café – ok 👍</think><action>look</action>", "look", True),
    "control characters": (f"{THOUGHT}<action>open\x00box\x1b 1</action>", "open box 1", True),
    "too long": (f"{THOUGHT}<action>{'a' * 300}</action>", "a" * 256, False),
    "as long as allowed": (f"{THOUGHT}<action>{'a' * 256}</action>", "a" * 256, True),
}
# After a prompt that ends with a thought, begun or closed.
OPENED = {
    "a thought begun": ("<think>\n", "it is closed</think><action>look</action>", "look", True),
    "a thought begun twice": ("<think>\n", f"{THOUGHT}<action>look</action>", "look", True),
    "a thought begun, not ended": ("<think>\n", "it is <action>look</action>", "look", False),
    "an empty thought": ("<think>\n\n</think>\n\n", "<action>look</action>", "look", True),
    "nothing after it": ("<think>\n\n</think>\n\n", "look", "", False),
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


@pytest.mark.parametrize("opened, answer, action, valid", OPENED.values(), ids=OPENED.keys())
def test_what_the_prompt_opened_counts_as_said(opened, answer, action, valid):
    assert parse_action(answer, tags=True, opened=opened) == ParsedAction(action, valid)
    assert parse_action(answer, tags=False, opened=opened) == parse_action(answer, tags=False)


@pytest.mark.parametrize("opened", ["", "<think>\n", "<think>\n\n</think>\n\n"])
def test_an_experts_answer_goes_on_from_what_the_prompt_opened(opened):
    answer = agent.expert_answer("look", "tagged", opened)
    assert parse_action(answer, True, opened) == ParsedAction("look", True)
    assert (opened + answer).count("<think>") == (opened + answer).count("</think>") == 1
    assert agent.expert_answer("look", "bare", opened) == "look"


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


# ---------------------------------------------------------------------------------------------- window memory

FIRST = Observation(text="a room with {0} and 100%", goal="open it.", commands="open OBJ, wait", admissible=("wait",))
NOW = Observation(text="seen now", goal="open it.", objects=("box", "lid"), admissible=("look", "wait"))
HISTORY = [(f"seen {i}", f"act {i}") for i in range(1, 6)]


@pytest.mark.parametrize("style", agent.STYLES)
def test_the_first_window_is_the_opening_of_a_conversation(style):
    assert window_message(FIRST, [], FIRST, style, Window()) == agent.first_message(FIRST, style)


def test_a_tagged_window_holds_the_papers_fields():
    lines = window_message(FIRST, HISTORY, NOW, "tagged", Window()).splitlines()
    assert lines[1:] == [
        "Your task is to: open it.",
        "You have taken 5 step(s) so far. The latest, and what you saw before each of them:",
        "[Observation 4: 'seen 4', Action 4: 'act 4']",
        "[Observation 5: 'seen 5', Action 5: 'act 5']",
        "Step 6. What you see now: seen now",
        "Commands: open OBJ, wait",
        "Things that commands can name now: box, lid",
        "Commands that work now: look, wait",
        agent._RULES,
    ]


def test_older_actions_are_named_without_what_was_seen():
    lines = window_message(FIRST, HISTORY, NOW, "tagged", Window(2, older_actions=True)).splitlines()
    assert lines[3:8] == [
        "[Action 1: 'act 1']",
        "[Action 2: 'act 2']",
        "[Action 3: 'act 3']",
        "[Observation 4: 'seen 4', Action 4: 'act 4']",
        "[Observation 5: 'seen 5', Action 5: 'act 5']",
    ]


@pytest.mark.parametrize("turns, shown", [(0, []), (1, [5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_a_window_holds_the_last_turns(turns, shown):
    bare = window_message(FIRST, HISTORY, NOW, "bare", Window(turns))
    assert bare == "\n".join([*(f"seen {i}\n> act {i}" for i in shown), "seen now", "open it."])
    tagged = window_message(FIRST, HISTORY, NOW, "tagged", Window(turns))
    assert [i for i in range(1, 6) if f"Action {i}" in tagged] == shown
    assert "You have taken 5 step(s) so far." in tagged


@pytest.mark.parametrize("style", agent.STYLES)
@pytest.mark.parametrize("limit", range(0, 1000, 50))
def test_what_does_not_fit_loses_its_middle_and_never_the_task(style, limit):
    now = Observation(text="".join(f"{i:03d} " for i in range(60)), goal="open it.")
    cut = window_message(FIRST, HISTORY, now, style, Window(3), lambda message: len(message) <= limit)
    shown = [i for i in range(1, 6) if f"act {i}" in cut]
    assert shown == list(range(6 - len(shown), 6)) and len(shown) <= 3  # the oldest went first
    assert "open it." in cut
    assert (style == "bare") or ("open OBJ, wait" in cut and agent._RULES in cut)
    if now.text not in cut:
        assert not shown and " ... " in cut
    least = len(window_message(FIRST, HISTORY, Observation(text="", goal="open it."), style, Window(0)))
    assert len(cut) <= max(limit, least + len(" ... ") + 1)
    if limit >= 900:
        assert len(shown) == 3


def test_fits_is_asked_a_few_times_only():
    calls = []
    history = HISTORY * 10
    window_message(FIRST, history, NOW, "tagged", Window(50), lambda message: calls.append(message) or False)
    assert len(calls) <= 2 + 6 + 1 + 4
    calls.clear()
    window_message(FIRST, history, NOW, "tagged", Window(50), lambda message: not calls.append(message))
    assert len(calls) == 1
