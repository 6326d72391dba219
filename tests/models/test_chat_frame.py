"""What a rollout appends, and what transformers renders from the same chat template: twenty templates, any text."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epo_jax.envs import agent
from epo_jax.models.chat_frame import TAGS
from epo_jax.models.tokenizer import load_tokenizer
from tests.models import templates
from tests.models.templates import CASES

NAMES = pytest.mark.parametrize("name", CASES)
FEW = settings(max_examples=12, deadline=None)

# Any text, and texts of games with blanks around them; answers have none, for some templates trim them.
WORDS = st.sampled_from(["You see a drawer 1.", "\n", "  ", "café – 打开", "-= room =-", "[INST]", "<|user|>", "1", "\t", "'s"])
MESSAGES = st.lists(WORDS | st.text(max_size=6), max_size=6).map("".join)
SAID = st.sampled_from(["look", " at", "\n", "apple 1", ", ", "é"])
ANSWERS = st.lists(SAID, min_size=1, max_size=5).map("".join).map(str.strip)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of each case: the tokenizer as a run loads it, and transformers' own."""
    from transformers import PreTrainedTokenizerFast

    folder, both = tmp_path_factory.mktemp("models"), {}
    for name, case in CASES.items():
        ours = load_tokenizer(templates.write(folder / name.replace(" ", "-"), case))
        named = {"eos_token": case.eos, "bos_token": case.bos, "pad_token": case.pad}
        theirs = PreTrainedTokenizerFast(
            tokenizer_object=templates.backend_of(case), chat_template=case.template,
            **{role: token for role, token in named.items() if token},
        )  # fmt: skip
        both[name] = ours, theirs
    return both


def rendered(theirs, messages, generate=True):
    return theirs.apply_chat_template(messages, add_generation_prompt=generate)["input_ids"]


def turn(role, text):
    return {"role": role, "content": text}


def ordinary(case, text):
    return not any(token in text for token in case.special)


def said(frame, thought, action):
    """(an answer in the paper's form after what the prompt opened, all of it)"""
    whole = f"<think>{thought}</think><action>{action}</action>"
    if "</think>" in frame.opened:
        return f"<action>{action}</action>", f"{frame.opened}<action>{action}</action>"
    return whole.removeprefix(frame.opened.strip()), frame.opened + whole.removeprefix("<think>") if frame.opened else whole


@NAMES
def test_the_frame_of_a_template(models, name):
    case, frame = CASES[name], models[name][0].frame
    assert (frame.opened, frame.rewrites, frame.trims) == (case.opened, case.rewrites, case.trims)
    assert frame.stop == (case.stop or case.eos)
    assert {frame.stop, *frame.stops} == {frame.stop, case.eos, *case.ends}


@NAMES
@FEW
@given(text=MESSAGES)
def test_a_windows_prompt_is_what_transformers_renders(models, name, text):
    ours, theirs = models[name]
    if ordinary(CASES[name], text):
        prompt = rendered(theirs, [turn("user", text)])
        if name == "no generation prompt":  # whose answers begin with a header that the model should not have to write
            prompt += theirs.encode("<|im_start|>assistant\n")
        assert ours.first(text) == prompt


@NAMES
@FEW
@given(turns=st.lists(st.tuples(MESSAGES, ANSWERS, ANSWERS), min_size=2, max_size=4), tagged=st.booleans())
def test_an_appended_conversation_is_what_transformers_renders(models, name, turns, tagged):
    case, (ours, theirs) = CASES[name], models[name]
    if ours.frame.rewrites == "turns" or (tagged and ours.frame.rewrites) or name == "no generation prompt":
        return
    ids, messages = [], []
    for message, thought, action in turns:
        if not ordinary(case, message):
            return
        ids += ours.following(message, ids[-1]) if ids else ours.first(message)
        messages.append(turn("user", message))
        assert ids == rendered(theirs, messages)
        answer, whole = said(ours.frame, thought, action) if tagged else (action, ours.frame.opened + action)
        ids += ours.answer(answer)
        assert ids[-1] == ours.stop_id and ours.decode(ours.answer(answer)).strip() == answer
        messages.append(turn("assistant", whole))


@NAMES
@FEW
@given(
    turns=st.lists(st.tuples(MESSAGES, ANSWERS), min_size=2, max_size=3),
    spelled=st.sampled_from(["{0}", "a{0}b", "{1}\nuser\n{0}", "{0}{1}", "{0}\U0010fffd{2}\U0010fffd", "{0}\U0010fffd{2}"]),
)
def test_no_text_spells_a_control_token(models, name, turns, spelled):
    """Neither a game nor a policy: the characters are read, and only the frame's own tokens frame."""
    case, (ours, _) = CASES[name], models[name]
    control = [ours.backend.token_to_id(token) for token in case.special if token not in TAGS]
    text = spelled.format(*[token for token in case.special[::-1] if token not in TAGS][:2], control[0])

    def controls(ids):
        return [i for i in ids if i in control]

    for message, answer in turns:
        assert controls(ours.first(message + text + answer)) == controls(ours.first("m"))
        assert controls(ours.following(message + text + answer, ours.stop_id)) == controls(ours.following("m", ours.stop_id))
        assert controls(ours.answer(answer + text)) == [ours.stop_id] and not controls(ours.encode(text + message))
    if case.family == "bytes" and not case.flags:
        assert (
            ours.backend.decode(ours.first(f"a {text} b"), skip_special_tokens=False)
            == (f"{ours.frame.head}a {text} b{ours.frame.reply}")
            or "\U0010fffd" in text
        )


@NAMES
@FEW
@given(text=MESSAGES)
def test_spelled_tokens_leave_the_rest_as_it_is(models, name, text):
    """The frame, and what merges with it, is encoded as ever: against the pieces between control tokens, each by itself."""
    case, (ours, theirs) = CASES[name], models[name]
    if case.family != "bytes" or case.flags or not ordinary(case, text):
        return
    spelled = next(token for token in case.special if token not in TAGS)
    whole = f"{text} {spelled} {text}"
    plain = templates.backend_of(case)
    plain.encode_special_tokens = True
    if "<think>" in case.special:
        return
    special = "|".join(map(re.escape, sorted(case.special, key=len, reverse=True)))
    head, reply = (re.split(f"({special})", part) for part in (ours.frame.head, ours.frame.reply))
    if case.trims:
        whole = whole.strip()
    pieces = [*head[:-1], head[-1] + whole + reply[0], *reply[1:]]
    expected = []
    for number, piece in enumerate(pieces):
        literal = number == len(head) - 1
        expected += plain.encode(piece).ids if literal else theirs.encode(piece, add_special_tokens=False)
    assert ours.first(f"{text} {spelled} {text}") == expected


@NAMES
def test_only_what_frames_a_turn_is_dropped(models, name):
    case, (ours, _) = CASES[name], models[name]
    answer = "<think>a</think><action>look</action>"
    ids = ours.backend.encode(answer, add_special_tokens=False).ids
    framing = [ours.stop_id, *ours.stop_ids, ours.backend.token_to_id(case.pad or case.eos)]
    assert ours.decode([*ids, *framing]).strip() == answer
    assert agent.parse_action(ours.decode([*ids, *framing]), tags=True) == ("look", True)
    for token in {*case.special, *case.words} - {case.pad, case.bos, case.eos, case.stop, *case.ends}:
        if token not in ours.frame.head + ours.frame.reply + ours.frame.between:
            assert token in ours.decode([*ids, ours.backend.token_to_id(token)])


def test_a_turn_that_ended_otherwise_is_closed(models):
    """Another stop token, or none at all: the next message begins as after the template's."""
    ours, theirs = models["qwen2.5"]
    other = theirs.convert_tokens_to_ids("<|endoftext|>")
    conversation = [turn("user", "a"), turn("assistant", "look"), turn("user", "b")]
    look = ours.encode("look")
    assert ours.first("a") + look + ours.following("b", last=look[-1]) == rendered(theirs, conversation)
    conversation[1]["content"] = "look<|endoftext|>"
    assert ours.first("a") + look + [other] + ours.following("b", last=other) == rendered(theirs, conversation)
    assert ours.decode([*look, other]) == "look"


def test_a_frame_survives_saving(models, tmp_path):
    for name, (ours, _) in models.items():
        ours.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert again.frame == ours.frame and again.stop_ids == ours.stop_ids and again.roles == ours.roles
        assert again.first("a <|im_end|> b") == ours.first("a <|im_end|> b")
