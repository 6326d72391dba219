"""Tokenizer files from the wild: read as they are meant, or refused in one sentence."""

import json
import shutil

import pytest

from epo_jax.common.errors import UserError
from epo_jax.models.tokenizer import load_tokenizer
from tests.models import templates

QWEN = templates.CASES["qwen2.5"]


@pytest.fixture
def folder(tmp_path):
    return templates.write(tmp_path / "model", QWEN)


def change(folder, file="tokenizer_config.json", **settings):
    path = folder / file
    stated = (json.loads(path.read_text()) if path.exists() else {}) | settings
    path.write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))


def damage(file, text):
    return lambda folder: (folder / file).write_text(text)


def newer(folder):
    change(folder, "tokenizer.json", version="2.0")


def without_end(folder):
    """eos_token names a token that tokenizer.json lacks, and the template puts it after an answer."""
    template = QWEN.template.replace("'<|im_end|>", "'</eos>")
    change(folder, eos_token="</eos>", chat_template=template)


def template(text):
    return lambda folder: change(folder, chat_template=text)


def unsaid_end(folder):
    change(folder, eos_token=None, chat_template="{% for m in messages %}<|im_start|>{{ m.content }}{{ eos_token }}{% endfor %}")


REFUSED = {
    "a newer tokenizer.json": (newer, "tokenizer.json cannot be read by tokenizers"),
    "a tokenizer.json cut short": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
    "a tokenizer.json of something else": (damage("tokenizer.json", "[]"), "tokenizer.json cannot be read"),
    "settings that are a list": (damage("tokenizer_config.json", "[]"), "tokenizer_config.json holds no table"),
    "settings cut short": (damage("tokenizer_config.json", '{"a"'), "tokenizer_config.json cannot be read as JSON"),
    "special tokens that are a list": (damage("special_tokens_map.json", "[]"), "special_tokens_map.json holds no table"),
    "generation settings cut short": (damage("generation_config.json", "{"), "generation_config.json cannot be read as JSON"),
    "an end that is no id": (
        lambda f: change(f, "generation_config.json", eos_token_id=["</s>"]), "eos_token_id=.* must be the id of a token"
    ),
    "a token at another place": (
        lambda f: change(f, "added_tokens.json", **{"<|extra|>": 9999}), "no room for token '<|extra|>' at id 9999"
    ),
    "added tokens that are numbers": (lambda f: change(f, added_tokens_decoder={"x": 1}), "added_tokens_decoder"),
    "no chat template": (lambda f: change(f, chat_template=None), "no chat template"),
    "a template that raises": (template("{{ raise_exception('never') }}"), "cannot be rendered .TemplateError: never"),
    "a template that does not parse": (template("{% for m in %}"), "cannot be rendered .TemplateSyntaxError"),
    "a template that divides by zero": (template("{{ 1 / 0 }}"), "cannot be rendered .ZeroDivisionError"),
    "a template without messages": (template("hello"), "renders a message 0 times"),
    "a template that says all twice": (
        template("{% for m in messages %}{{ m.content + m.content }}{% endfor %}"), "renders a message 2 times"
    ),
    "a template that shouts": (
        template("{% for m in messages %}{{ m.content | replace('\n', ' ') }}<|im_end|>{% endfor %}"), "changes the text"
    ),
    "an answer that ends with text": (
        template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"), "ends an answer with 'user:'"
    ),
    "an end that is no token": (without_end, "ends an answer with '</eos>"),
    "an end that is not named": (unsaid_end, "ends an answer with '<|im_start|>'"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_told_in_a_sentence(folder, make, message):
    make(folder)
    with pytest.raises(UserError, match=message) as refusal:
        load_tokenizer(folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


DAMAGED = {
    "cut short": '{"head": ',
    "a list": "[]",
    "a part missing": '{"head": ""}',
    "a part unknown": '{"head": "", "reply": "", "between": "", "stop": "<|im_end|>", "foot": ""}',
    "a number": '{"head": 1, "reply": "", "between": "", "stop": "<|im_end|>"}',
    "another model's": '{"head": "", "reply": "", "between": "", "stop": "<|eot_id|>"}',
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_frame_is_told_in_a_sentence(folder, text):
    (folder / "chat_frame.json").write_text(text)
    with pytest.raises(UserError, match="chat_frame.json") as refusal:
        load_tokenizer(folder)
    assert "\n" not in str(refusal.value)


def test_a_frame_of_an_earlier_version_is_read(folder):
    """Four parts, as runs stored them before there were more."""
    stored = {"head": "", "reply": "<|im_start|>", "between": "", "stop": "<|im_end|>"}
    (folder / "chat_frame.json").write_text(json.dumps(stored))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.stop_ids == (tokenizer.stop_id,) and tokenizer.frame.rewrites == "" and not tokenizer.files


def make_slow(folder):
    """Replaces tokenizer.json by vocab.json and merges.txt; returns what tokenizer_config.json lists beside them."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(stored["model"]["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    listed = {str(token["id"]): {"content": token["content"], "special": token["special"]} for token in stored["added_tokens"]}
    change(folder, tokenizer_class="Qwen2Tokenizer")
    return listed


def test_slow_files_are_converted(folder):
    """vocab.json and merges.txt give the ids of the tokenizer.json that was made of them."""
    whole = load_tokenizer(folder)
    change(folder, added_tokens_decoder=make_slow(folder))
    slow = load_tokenizer(folder)
    assert slow.frame == whole.frame and slow.stop_ids == whole.stop_ids and slow.vocab_size == whole.vocab_size
    assert slow.first("take apple from cabinet") == whole.first("take apple from cabinet")
    # A run keeps it as tokenizer.json.
    slow.save(folder.parent / "run")
    shutil.rmtree(folder)
    assert load_tokenizer(folder.parent / "run").first("take apple") == whole.first("take apple")


@pytest.mark.parametrize("lost", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "all"])
def test_slow_files_that_leave_an_id_open_are_refused(folder, lost):
    """transformers would make one up, or read the token as text."""
    listed = make_slow(folder)
    change(folder, added_tokens_decoder={i: token for i, token in listed.items() if lost not in ("all", token["content"])})
    with pytest.raises(UserError, match=str(folder)) as refusal:
        load_tokenizer(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kept", [(), ("vocab.json",), ("merges.txt",)])
def test_a_folder_without_a_vocabulary_is_refused(folder, kept):
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    for name in kept:
        (folder / name).write_text("{}")
    with pytest.raises(UserError, match="holds no tokenizer.json") as refusal:
        load_tokenizer(folder)
    assert str(folder) in str(refusal.value)


def test_an_empty_vocabulary_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    change(folder, tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(UserError, match=str(folder)):
        load_tokenizer(folder)


def test_tokens_that_only_the_settings_list_are_added(folder):
    """As transformers does: older chat models add theirs in added_tokens.json or tokenizer_config.json."""
    whole = load_tokenizer(folder)
    stored = json.loads((folder / "tokenizer.json").read_text())
    *kept, last = stored["added_tokens"]
    before_last = kept.pop()
    change(folder, "tokenizer.json", added_tokens=kept)
    change(folder, "added_tokens.json", **{before_last["content"]: before_last["id"]})
    change(folder, added_tokens_decoder={str(last["id"]): {"content": last["content"], "special": True}})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.frame == whole.frame and tokenizer.first("a") == whole.first("a")
    assert tokenizer.vocab_size == whole.vocab_size


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_every_end_that_the_model_names_ends_a_turn(folder, file):
    (folder / "generation_config.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.stop_ids == (tokenizer.stop_id,)
    other = tokenizer.backend.token_to_id("<|vision_start|>")
    text = tokenizer.encode("look")[0]
    # An id of ordinary text is a default of the class that nobody set.
    (folder / file).write_text(json.dumps({"eos_token_id": [other, tokenizer.stop_id, text, 10**6]}))
    assert load_tokenizer(folder).stop_ids == (tokenizer.stop_id, other)
    (folder / file).write_text(json.dumps({"eos_token_id": other}))
    assert load_tokenizer(folder).stop_ids == (tokenizer.stop_id, other)


def test_a_tokenizer_that_was_saved_in_batches_cuts_and_pads_nothing(folder):
    whole = load_tokenizer(folder)
    change(
        folder, "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                 "pad_token": "<|endoftext|>"},
    )  # fmt: skip
    assert load_tokenizer(folder).first("take apple 1 from cabinet 3") == whole.first("take apple 1 from cabinet 3")


def test_a_named_end_that_the_vocabulary_lacks_does_not_matter_beside_the_templates(folder):
    change(folder, eos_token="</eos>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.frame.stop == "<|im_end|>" and tokenizer.vocab_size == load_tokenizer(folder).vocab_size
