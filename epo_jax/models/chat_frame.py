"""The chat frame: text that a chat template puts around messages.

A template is a program over a whole conversation; a rollout appends to one. Therefore the template is rendered with markers, the
text around them becomes the frame, and the frame is checked against what the template renders for longer conversations. A
template that rewrites earlier turns (Qwen3 and DeepSeek-R1 drop their thoughts) still gives a frame for window contexts, in which
each turn is separate.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Collection

# The tags of an answer (epo_jax.envs.agent) are text, even if a tokenizer has them as special tokens.
TAGS = frozenset({"<think>", "</think>", "<action>", "</action>"})

# A thought at the end of a prompt: opened, or empty and closed (Qwen3 without thinking).
_OPENED = re.compile(r"<think>\s*(?:</think>\s*)?\Z")

_MESSAGE, _ANSWER, _LATER = "\u27e61\u27e7", "\u27e62\u27e7", "\u27e63\u27e7"

# Renders (messages, add_generation_prompt).
Render = Callable[[list[dict[str, str]], bool], str]


class UnusableTemplate(ValueError):
    """A chat template has no frame.

    The message continues the sentence "its chat template".
    """


@dataclasses.dataclass(frozen=True)
class ChatFrame:
    """The text around the parts of a conversation.

    A conversation is `head` message `reply` answer `stop` `between` message `reply` answer ...

    Attributes:
        stop: the token that ends an answer in the template; the policy emits it.
        stops: other tokens that end a turn.
        answer_start, answer_end: whitespace around an answer, which the policy emits too (one each in Llama 2's template).
        trims: the template strips whitespace around messages.
        rewrites: what later turns change in earlier ones: "" nothing, so a conversation can be appended to; "thoughts" the
            thoughts, so it can be appended to if answers have none; "turns" more, so it cannot be appended to.
    """

    head: str
    reply: str
    between: str
    stop: str
    stops: tuple[str, ...] = ()
    answer_start: str = ""
    answer_end: str = ""
    trims: bool = False
    rewrites: str = ""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            wanted = field.type if field.type in (str, bool) else tuple
            if not isinstance(getattr(self, field.name), wanted):
                raise TypeError(f"{field.name} must be of type {wanted.__name__}")

    @property
    def opened(self) -> str:
        """The opening of a thought at the end of the prompt.

        The policy continues it.
        """
        found = _OPENED.search(self.reply)
        return found[0] if found else ""

    def message(self, text: str) -> str:
        """The text of a message as the template renders it."""
        return text.strip() if self.trims else text

    def template(self) -> str:
        """The frame as a Hugging Face chat template.

        Newlines join system and tool messages to user messages.
        """
        head, reply, between, start, end = (
            json.dumps(part, ensure_ascii=False)
            for part in (self.head, self.reply, self.between, self.reply + self.answer_start, self.answer_end + self.stop)
        )
        return (
            "{% for message in messages %}{% if message['role'] == 'assistant' %}"
            "{{ " + start + " + message['content'] + " + end + " }}"
            "{% else %}{% if loop.first %}{{ " + head + " }}"
            "{% elif loop.previtem['role'] == 'assistant' %}{{ " + between + " }}{% else %}{{ '\\n' }}{% endif %}"
            "{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ " + reply + " }}{% endif %}"
        )


def frame_of_template(render: Render, tokens: Collection[str], ends: Collection[str]) -> ChatFrame:
    """The frame of the template behind `render`.

    Args:
        tokens: the added tokens of the tokenizer.
        ends: those that the model's files list as ends of a turn.

    Raises:
        UnusableTemplate: a message or the end of an answer cannot be found in what the template renders.
    """
    first = render([_user(_MESSAGE)], True)
    if first.count(_MESSAGE) != 1:
        raise UnusableTemplate(f"renders a message {first.count(_MESSAGE)} times instead of once")
    head, reply = first.split(_MESSAGE)
    trims = _trims(render, head, reply)
    thread = _rendered(render, [_user(_MESSAGE), _assistant(_ANSWER), _user(_LATER)], True)
    last = _rendered(render, [_user(_MESSAGE), _assistant(_ANSWER)], False)
    stop = _stop(thread, last, tokens, ends)
    stops = tuple(sorted({*ends, _next_token(_after(last), tokens) or stop} - {stop}))
    frame = ChatFrame(head, reply, between="", stop=stop, stops=stops, trims=trims, rewrites="turns")

    # Compare the text between message and answer with the end of a prompt.
    parts = re.fullmatch(f"{re.escape(head + _MESSAGE)}(.*){_ANSWER}(.*){_LATER}{re.escape(reply)}", thread, re.DOTALL)
    if parts is None:
        return frame
    start, end = parts.groups()
    end, _, between = end.partition(stop)
    given = missing = ""  # the part of the answer in the prompt; the part that the generation prompt lacks
    if start.startswith(reply) and not start.removeprefix(reply).strip():
        start = start.removeprefix(reply)
    elif start.startswith(reply) and "<think>" not in start.removeprefix(reply):
        # The template ignores add_generation_prompt.
        reply, start, missing = start, "", start.removeprefix(reply)
    elif frame.opened and start + frame.opened == reply:
        start, given = "", frame.opened
    else:
        return frame
    frame = dataclasses.replace(frame, reply=reply, between=between, answer_start=start, answer_end=end)
    for rewrites, answer in (("", _thought), ("thoughts", str)):
        if _appends(render, frame, given, missing, answer):
            return dataclasses.replace(frame, rewrites=rewrites)
    return frame


def control_tokens(frame: ChatFrame, tokens: Collection[str]) -> frozenset[str]:
    """The added `tokens` that frame a turn; the others are text."""
    framed = find_tokens(tokens).findall(frame.head + frame.reply + frame.between) if tokens else []
    return frozenset({frame.stop, *frame.stops, *framed}) - TAGS


def find_tokens(tokens: Collection[str]) -> re.Pattern:
    """A pattern that matches any of the tokens, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _rendered(render: Render, messages: list[dict[str, str]], generate: bool) -> str:
    """The rendered conversation, or "" if the template raises an error."""
    try:
        return render(messages, generate)
    except Exception:  # whatever the template raises
        return ""


def _trims(render: Render, head: str, reply: str) -> bool:
    padded = f" \n{_MESSAGE}\n "
    rendered = render([_user(padded)], True)
    for trims, text in ((False, padded), (True, _MESSAGE)):
        if rendered == head + text + reply:
            return trims
    raise UnusableTemplate("changes the text of a message")


def _after(text: str) -> str:
    """The text between the answer and the next message."""
    return text.partition(_ANSWER)[2].partition(_LATER)[0]


def _next_token(text: str, tokens: Collection[str]) -> str | None:
    """The token at the beginning of `text`, after whitespace."""
    found = find_tokens(tokens).match(text.lstrip())
    return found[0] if found else None


def _stop(thread: str, last: str, tokens: Collection[str], ends: Collection[str]) -> str:
    """The token after an answer.

    If there is none after the last answer, it may belong to the next message; then it must be one of `ends`.
    """
    between, final = _next_token(_after(thread), tokens), _next_token(_after(last), tokens)
    if between and (final or between in ends):
        return between
    if final and not between:
        return final
    ending = (_after(thread) or _after(last)).strip()
    raise UnusableTemplate(f"ends an answer with {ending[:40]!r}, where one token that ends a turn should be")


def _thought(text: str) -> str:
    return f"<think>{text}</think><action>{text}</action>"


def _appends(render: Render, frame: ChatFrame, given: str, missing: str, answer: Callable[[str], str]) -> bool:
    """Whether appending three turns one by one gives what the template renders."""
    text, messages = "", []
    for turn in range(3):
        message, said = f"message {turn}", answer(f"answer {turn}")
        if given and said.startswith("<think>"):
            said = said.partition("</think>" if "</think>" in given else "<think>")[2]
        messages.append(_user(message))
        text += (frame.between if turn else frame.head) + message + frame.reply
        if _rendered(render, messages, True) + missing != text:
            return False
        messages.append(_assistant(given + said))
        text += frame.answer_start + said + frame.answer_end + frame.stop
    return True
