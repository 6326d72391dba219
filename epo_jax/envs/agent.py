"""What the agent reads and how its answer becomes an action.

Two styles. "tagged" is for language models that follow instructions: the first message holds the task, the observation
and the rules, and the answer is `<think>...</think><action>...</action>`, the fields and tags of the paper's prompts.
"bare" is for small models: messages are plain observations and the whole answer is the action.
"""

import re
import unicodedata
from typing import NamedTuple

from epo_jax.envs.base import Observation

STYLES = ("bare", "tagged")
MAX_ACTION_CHARS = 256

# The innermost pair, so that an unclosed <action> before a closed one does not swallow it.
_ACTION = re.compile(r"<action>((?:(?!<action>).)*?)</action>", re.IGNORECASE | re.DOTALL)
_BLANKS = re.compile(r"[\s\x00-\x1f\x7f]+")

_FIRST = """You are an agent in a text world and act in it one command at a time.
Your task: {goal}
What you see now: {text}
{actions}"""
_NEXT = """What you see now: {text}
{actions}"""
_RULES = (
    "First reason step by step about the situation and the task between <think> and </think>. "
    "Then give exactly one command between <action> and </action>."
)


class ParsedAction(NamedTuple):
    """The command for the environment ("" where there is none) and whether the answer kept to the format."""

    action: str
    valid: bool


def parse_action(text: str, tags: bool) -> ParsedAction:
    """Reads the action out of one answer of the policy.

    With tags, the action is the content of the last complete `<action>...</action>`, and the answer is valid if there
    is one, it is not empty, and a complete `<think>...</think>` is there too. Without tags, the action is the whole
    answer and valid unless empty. Tags match in any case. In both styles:

    * the action is lower-cased, control characters and runs of blanks become one blank, outer blanks go, and
      it is cut after 256 characters (a cut action is not valid);
    * letters of a script other than Latin anywhere in the answer make it invalid; the action is played all the same.
    """
    if tags:
        found = _ACTION.findall(text)
        content, formatted = (found[-1] if found else ""), _has_thought(text.lower())
    else:
        content, formatted = text, True
    action = _BLANKS.sub(" ", content).strip().lower()
    valid = formatted and 0 < len(action) <= MAX_ACTION_CHARS and _is_latin(text)
    return ParsedAction(action[:MAX_ACTION_CHARS].rstrip(), valid)


def first_message(observation: Observation, style: str) -> str:
    """The user turn that opens an episode, from the observation after its reset."""
    if style == "bare":
        return f"{observation.text}\n{observation.goal}".strip()
    return _FIRST.format(goal=observation.goal, text=observation.text, actions=_actions(observation))


def next_message(observation: Observation, style: str) -> str:
    """The user turn after a step."""
    if style == "bare":
        return observation.text
    return _NEXT.format(text=observation.text, actions=_actions(observation))


def _actions(observation: Observation) -> str:
    lines = [_RULES]
    if observation.admissible:
        lines.insert(0, f"Commands that work now: {', '.join(observation.admissible)}")
    if observation.commands:
        lines.insert(0, f"Commands: {observation.commands}")
    return "\n".join(lines)


def _has_thought(text: str) -> bool:
    opened = text.find("<think>")
    return opened >= 0 and text.find("</think>", opened) > 0


def _is_latin(text: str) -> bool:
    if text.isascii():
        return True
    return all("LATIN" in unicodedata.name(char, "") for char in text if char.isalpha() and not char.isascii())


def expert_answer(action: str, style: str) -> str:
    """How an expert's action would have been answered by the policy, for behaviour cloning."""
    if style == "bare":
        return action
    return f"<think>The next step towards the task is to {action}.</think><action>{action}</action>"
