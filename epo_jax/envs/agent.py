"""Prompts for the policy, and the parser of its answers.

There are two styles. "tagged" is for language models that follow instructions: a message contains the task, the observation, the
commands and the rules; the answer is `<think>...</think><action>...</action>`, with the fields and tags of the paper's prompts.
"bare" is for small models: messages are plain observations, and the whole answer is the action.

There are two kinds of memory. A conversation begins with `first_message` and continues with `next_message` after every step.
With a window, as in the paper, each turn is a single message, `window_message`, which repeats the task and the last few turns.
"""

import bisect
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import regex

from epo_jax.envs.base import Observation

STYLES = ("bare", "tagged")
MAX_ACTION_CHARS = 256

# The innermost pair, so that an unclosed <action> before a closed one does not swallow it.
_ACTION = re.compile(r"<action>((?:(?!<action>).)*?)</action>", re.IGNORECASE | re.DOTALL)
_BLANKS = re.compile(r"[\s\x00-\x1f\x7f]+")

# A letter that no English answer contains, by Unicode script. \u00b5 and \u00ba are Common and Latin, \u03a9 and \u0394 Greek.
_FOREIGN = regex.compile(r"[\p{L}--[\p{Latin}\p{Greek}\p{Common}\p{Inherited}]]", regex.V1)

_OPENING = "You are an agent in a text world and act in it one command at a time."
_RULES = (
    "First reason step by step about the situation and the task between <think> and </think>. "
    "Then give exactly one command between <action> and </action>."
)


class Window(NamedTuple):
    """What a message repeats of earlier turns.

    Attributes:
        turns: number of last turns with observation and action (the paper: 2).
        older_actions: whether to list the actions of all turns before those (the paper: in ScienceWorld).
    """

    turns: int = 2
    older_actions: bool = False


class ParsedAction(NamedTuple):
    """The command for the environment ("" if there is none), and whether the answer has the required format."""

    action: str
    valid: bool


def parse_action(text: str, tags: bool, opened: str = "") -> ParsedAction:
    """Parses the action from an answer of the policy.

    With tags, the action is the content of the last complete `<action>...</action>`. The answer is valid if the action is not
    empty and there is a complete `<think>...</think>`; `opened`, the part of the answer with which the prompt ends
    (`ChatFrame.opened`), counts as its beginning. Without tags, the action is the whole answer, which is valid unless it is
    empty. Tags match in any case. In both styles:

    * The action becomes lower case; control characters and runs of blanks become one blank; outer blanks are removed. It is cut
      after 256 characters (a cut action is not valid).
    * Letters of a script other than Latin and Greek (used as symbols: \u03a9, \u0394) make the answer invalid; its action is
      still played.
    """
    if tags:
        text = opened + text
        actions = _ACTION.findall(text)
        content, formatted = (actions[-1] if actions else ""), _has_thought(text.lower())
    else:
        content, formatted = text, True
    action = _BLANKS.sub(" ", content).strip().lower()
    valid = formatted and 0 < len(action) <= MAX_ACTION_CHARS and not _FOREIGN.search(text)
    return ParsedAction(action[:MAX_ACTION_CHARS].rstrip(), valid)


def first_message(observation: Observation, style: str) -> str:
    """Returns the user turn that opens an episode, from the observation after the reset."""
    if style == "bare":
        return f"{observation.text}\n{observation.goal}".strip()
    return _lines(_OPENING, _task(observation.goal), _now(observation.text), _offer(observation), _RULES)


def next_message(observation: Observation, style: str) -> str:
    """Returns the user turn after a step of a conversation."""
    if style == "bare":
        return observation.text
    return _lines(_now(observation.text), _offer(observation), _RULES)


def message(
    first: Observation,
    history: Sequence[tuple[str, str]],
    observation: Observation,
    style: str,
    window: Window | None = None,
    fits: Callable[[str], bool] = lambda message: True,
) -> str:
    """Returns the user turn for `observation`: `window_message` with a window, else the next turn of the conversation.

    Args: see `window_message`.
    """
    if window is not None:
        return window_message(first, history, observation, style, window, fits)
    return next_message(observation, style) if history else first_message(first, style)


def window_message(
    first: Observation,
    history: Sequence[tuple[str, str]],
    observation: Observation,
    style: str,
    window: Window,
    fits: Callable[[str], bool] = lambda message: True,
) -> str:
    """Returns the single user turn of a step: the task, the window of past turns, the observation.

    If a message does not fit, the oldest turns of the window are left out first, then the middle of the observation. Task,
    commands and rules always stay, so the result can still be too long.

    Args:
        first: the observation after the reset, with the goal and the forms of commands.
        history: (observation, action) of every turn so far, oldest first; empty at the first turn, whose message is that of
            `first_message`.
        observation: the current observation; `first` at the first turn.
        fits: whether a message is short enough, for example in tokens.
    """
    past = _past(history, style, window)
    offer = _offer(dataclasses.replace(observation, commands=first.commands))

    def message(past: list[str], text: str) -> str:
        if style == "bare":
            return _lines(*past, text, first.goal)
        if not history:
            return _lines(_OPENING, _task(first.goal), _now(text), offer, _RULES)
        taken = f"You have taken {len(history)} step(s) so far."
        if past:
            taken += " The latest, and what you saw before each of them:"
        return _lines(_OPENING, _task(first.goal), taken, *past, f"Step {len(history) + 1}. {_now(text)}", offer, _RULES)

    text = observation.text
    whole = message(past, text)
    if fits(whole):
        return whole
    dropped = bisect.bisect_left(range(len(past)), True, key=lambda n: fits(message(past[n:], text)))
    shorter = message(past[dropped:], text)
    if dropped < len(past) or fits(shorter):
        return shorter
    removed = bisect.bisect_left(range(len(text)), True, key=lambda n: fits(message([], _without_middle(text, n))))
    return message([], _without_middle(text, removed))


def _past(history: Sequence[tuple[str, str]], style: str, window: Window) -> list[str]:
    """Returns the turns of the window as text, oldest first."""
    full = max(0, len(history) - window.turns)
    past = []
    for i, (text, action) in enumerate(history):
        if i < full and not window.older_actions:
            continue
        if style == "bare":
            past.append(f"> {action}" if i < full else f"{text}\n> {action}")
        else:
            seen = "" if i < full else f"Observation {i + 1}: '{text}', "
            past.append(f"[{seen}Action {i + 1}: '{action}']")
    return past


def _without_middle(text: str, removed: int) -> str:
    """Replaces `removed` characters in the middle of `text` by an ellipsis."""
    start = (len(text) - removed) // 2
    return f"{text[:start]} ... {text[start + removed :]}"


def _lines(*parts: str) -> str:
    return "\n".join(filter(None, parts))


def _task(goal: str) -> str:
    return goal if goal.lower().startswith("your task") else f"Your task is to: {goal}"


def _now(text: str) -> str:
    return f"What you see now: {text}"


def _offer(observation: Observation) -> str:
    """Returns the lines about possible actions, as far as the environment lists them."""
    return _lines(
        f"Commands: {observation.commands}" if observation.commands else "",
        f"Things that commands can name now: {', '.join(observation.objects)}" if observation.objects else "",
        f"Commands that work now: {', '.join(observation.admissible)}" if observation.admissible else "",
    )


def _has_thought(text: str) -> bool:
    opened = text.find("<think>")
    return opened >= 0 and text.find("</think>", opened) > 0


def expert_answer(action: str, style: str, opened: str = "") -> str:
    """Returns the answer for an expert's action, without the part `opened` that the prompt contains."""
    if style == "bare":
        return action
    thought = "" if "</think>" in opened else f"The next step towards the task is to {action}.</think>"
    return f"{'' if opened else '<think>'}{thought}<action>{action}</action>"
