"""Tokens in, tokens out: a byte-level BPE, and the chat frame that turns observations into prompt ids.

A conversation is append-only: `first(text)` opens it, the model answers up to its stop token, `following(text)` carries the
next observation. The ids of earlier turns are never rendered again, so the learner sees exactly what the sampler saw.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from epo_jax.errors import UserError

_PAD, _AGENT, _END = "<|pad|>", "<|agent|>", "<|end|>"

# Text games name things "cabinet 3" and speak in set phrases around the names. Keeping a noun with its number, and the words
# between two such things together, lets the BPE make one token of each: a small model can then copy a thing in one step, and
# episodes are half as long. A task ("put some apple in fridge") is followed by no numbered thing, so its words stay apart.
# (The 400 keeps a long text without numbers from being searched to its end at each word.)
_PIECES = r" ?\p{L}+ \d+|[^\d\n]{1,400}?(?= \p{L}+ \d)| ?\p{L}+| ?\d+|\s+| ?[^\s\p{L}\d]+"


@dataclasses.dataclass(frozen=True)
class ChatFrame:
    """The text around a conversation's parts: `head` observation `reply` answer `stop` `between` observation `reply` ..."""

    head: str
    reply: str
    between: str
    stop: str

    def template(self) -> str:
        """The same as a Hugging Face chat template of user and assistant messages."""
        head, reply, between, stop = (json.dumps(part, ensure_ascii=False) for part in dataclasses.astuple(self))
        return (
            "{% for message in messages %}"
            "{% if message['role'] == 'assistant' %}{{ " + reply + " + message['content'] + " + stop + " }}"
            "{% elif message['role'] == 'system' %}{{ raise_exception('A system message is part of the frame already.') }}"
            "{% else %}{{ (" + head + " if loop.first else " + between + ") + message['content'] }}"
            "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ " + reply + " }}{% endif %}"
        )


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
    """A `tokenizers.Tokenizer` with the chat frame of its model."""

    backend: tokenizers.Tokenizer
    frame: ChatFrame

    @property
    def stop_id(self) -> int:
        return self.backend.token_to_id(self.frame.stop)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def first(self, text: str) -> list[int]:
        """Ids that open a conversation and leave it at the model's turn."""
        return self.encode(self.frame.head + text + self.frame.reply)

    def following(self, text: str) -> list[int]:
        """Ids of a later observation, after the model's stop token, up to the model's turn."""
        return self.encode(self.frame.between + text + self.frame.reply)

    def answer(self, text: str) -> list[int]:
        """Ids of a model's turn, its stop token included."""
        return self.encode(text) + [self.stop_id]

    def save(self, folder: str | os.PathLike) -> None:
        """Writes what `load_tokenizer`, and transformers' `AutoTokenizer`, read."""
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.frame.stop,
            "pad_token": _PAD if self.backend.token_to_id(_PAD) is not None else self.frame.stop,
            "chat_template": self.frame.template(),
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
        (folder / "chat_frame.json").write_text(json.dumps(dataclasses.asdict(self.frame), indent=2))


def train_tokenizer(texts: Iterable[str], vocab_size: int, phrases: str = "") -> ChatTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens trained on `texts`; the same texts give the same tokenizer.

    What the regular expression `phrases` matches may become one token, blanks and all; elsewhere words stay apart.
    """
    pieces = f"{phrases}|{_PIECES}" if phrases else _PIECES
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pieces), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _AGENT, _END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return ChatTokenizer(backend, ChatFrame(head="", reply=_AGENT, between="", stop=_END))


def compose_embedding(embedding: np.ndarray, tokenizer: ChatTokenizer, seed: int) -> np.ndarray:
    """The embedding [V, D] with each numbered thing's row set to that of its noun plus that of its number.

    A model that starts from here sees at once that "apple 2" is an apple, which from random rows it would have to learn for
    every thing apart. The sum is scaled to keep the rows' norm.
    """
    rng = np.random.default_rng(seed)
    composed, parts = np.array(embedding), {}

    def part(word: str) -> np.ndarray:
        if word not in parts:
            ids = tokenizer.encode(f" {word}")
            parts[word] = embedding[ids[0]] if len(ids) == 1 else rng.normal(0, embedding.std(), embedding.shape[1])
        return parts[word]

    for token in range(tokenizer.vocab_size):
        thing = re.fullmatch(r" ?([^\W\d_]+) (\d+)", tokenizer.decode([token]))
        if thing:
            composed[token] = (part(thing[1]) + part(thing[2])) / 2**0.5
    return composed


def load_tokenizer(folder: str | os.PathLike) -> ChatTokenizer:
    """The tokenizer of a run folder, or of a Hugging Face model folder (its chat template gives the frame).

    Raises:
        UserError: the folder holds no readable tokenizer, or its chat template cannot be taken apart.
    """
    folder = Path(folder)
    if (folder / "chat_frame.json").exists():
        frame = ChatFrame(**json.loads((folder / "chat_frame.json").read_text()))
        return ChatTokenizer(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), frame)
    from transformers import AutoTokenizer  # seconds to import, and only a pretrained model needs it

    try:
        pretrained = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(
            f"No tokenizer can be read from {folder} ({error}); a model folder needs tokenizer.json and tokenizer_config.json."
        ) from error
    # transformers rebuilds some families' pre-tokenizers from the class it takes them for; the file is what was trained with.
    stored = folder / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(stored)) if stored.exists() else pretrained.backend_tokenizer
    return ChatTokenizer(backend, _frame_of_template(pretrained, folder))


def _frame_of_template(pretrained, folder: Path) -> ChatFrame:
    """Renders a conversation of markers and cuts the template's own text out from between them."""
    user, answer, later = "\u27e61\u27e7", "\u27e62\u27e7", "\u27e63\u27e7"
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": later},
    ]
    stop = pretrained.eos_token
    try:
        text = pretrained.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        head, rest = text.split(user)
        _, rest = rest.split(answer)
        between, reply = rest.split(later)
        _, between = between.split(stop, 1)  # the model itself emits the stop token
    except (ValueError, TypeError) as error:
        raise UserError(
            f"The chat template in {folder} cannot be used for an append-only conversation; "
            "set chat_template and eos_token in its tokenizer_config.json."
        ) from error
    return ChatFrame(head=head, reply=reply, between=between, stop=stop)
