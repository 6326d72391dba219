"""Tokens in, tokens out: a tokenizer with the chat frame that turns observations into prompt ids.

A conversation is append-only: `first(text)` opens it, the model answers up to its stop token, `following(text)` carries the
next observation. The ids of earlier turns are never rendered again, so the learner sees exactly what the sampler saw.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from epo_jax.common import keys
from epo_jax.common.errors import UserError
from epo_jax.common.files import write_atomically
from epo_jax.models import tokenizer_files
from epo_jax.models.chat_frame import TAGS, ChatFrame, control_tokens, find_tokens

_PAD, _AGENT, _END = "<|pad|>", "<|agent|>", "<|end|>"

# Text games name things "cabinet 3" and speak in set phrases around the names. Keeping a noun with its number, and the words
# between two such things together, lets the BPE make one token of each: a small model can then copy a thing in one step, and
# episodes are half as long. A task ("put some apple in fridge") is followed by no numbered thing, so its words stay apart.
# (The 400 keeps a long text without numbers from being searched to its end at each word.)
_PIECES = r" ?\p{L}+ \d+|[^\d\n]{1,400}?(?= \p{L}+ \d)| ?\p{L}+| ?\d+|\s+| ?[^\s\p{L}\d]+"

# A text that every tokenizer of an English model gives back.
_SAMPLE = "Take apple 1 from the table."

# The name of a control token while text is encoded; U+10FFFD is for private use. A text that has one of them loses its first
# character.
_ALIAS = "\U0010fffd{}\U0010fffd"
_ALIAS_START = re.compile("\U0010fffd(?=\\d+(?:\U0010fffd|\\Z))")


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
    """A `tokenizers.Tokenizer` with the chat frame of its model.

    Control tokens are those that frame a turn: they are in the frame, end a turn, or pad. All others are text.

    Attributes:
        roles: control tokens that the frame may not show: {"pad": ..., "bos": ...}, where there are such.
        folder, files: where the model's own files are, and which; none for a tokenizer that was trained here.
    """

    backend: tokenizers.Tokenizer
    frame: ChatFrame
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    files: tuple[str, ...] = ()

    @property
    def stop_id(self) -> int:
        """The token that ends an answer in the chat template."""
        return self.backend.token_to_id(self.frame.stop)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All tokens that end a turn, the template's first."""
        return tuple(self.backend.token_to_id(token) for token in (self.frame.stop, *self.frame.stops))

    @property
    def role_ids(self) -> dict[str, int]:
        """The ids of `roles`."""
        return {role: self.backend.token_to_id(token) for role, token in self.roles.items()}

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text without control tokens: where it spells one, its characters are encoded."""
        return self._framed("", text, "")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without control tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode([i for i in ids if i not in self._control_ids], skip_special_tokens=False)

    def first(self, text: str) -> list[int]:
        """Ids that open a conversation and leave it at the model's turn."""
        return self._framed(self.frame.head, self.frame.message(text), self.frame.reply)

    def following(self, text: str, last: int | None) -> list[int]:
        """Ids of a later observation up to the model's turn.

        Args:
            last: the token that the model's turn ended with. A turn that its budget ended, or another stop token than the
                template's, is closed with the template's.
        """
        ids = self._framed(self.frame.stop + self.frame.between, self.frame.message(text), self.frame.reply)
        return ids[1:] if last == self.stop_id else ids

    def answer(self, text: str) -> list[int]:
        """Ids of a model's turn after `frame.reply`, its stop token included."""
        frame = self.frame
        text = frame.answer_start + text + frame.answer_end
        prompt, whole = self._framed(frame.reply, "", ""), self._framed(frame.reply, text, frame.stop)
        # A prompt is encoded before its answer is known, so no token reaches across.
        return whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._framed("", text, frame.stop)

    def _framed(self, before: str, text: str, after: str) -> list[int]:
        """Ids of `text` between parts of the frame, whose control tokens are the only ones.

        Encoded at once, for tokens reach across from the frame to the text, as in what the template renders.
        """
        whole, found = before + text + after, self._special.findall
        if len(found(whole)) == len(found(before)) + len(found(after)):
            return self.backend.encode(whole, add_special_tokens=False).ids
        backend, aliases, ids = self._aliased
        before, after = (self._special.sub(lambda token: aliases[token[0]], part) for part in (before, after))
        whole = before + _ALIAS_START.sub("\ufffd", text) + after
        return [ids.get(i, i) for i in backend.encode(whole, add_special_tokens=False).ids]

    @functools.cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @functools.cached_property
    def _control(self) -> frozenset[str]:
        contents = [token.content for token in self._added.values()]
        return control_tokens(self.frame, contents) | (frozenset(self.roles.values()) - TAGS)

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.backend.token_to_id(token) for token in self._control)

    @functools.cached_property
    def _special(self) -> re.Pattern:
        """Matches what must not be read as a token in a text."""
        special = {token.content for token in self._added.values() if token.special}
        return find_tokens((special | {token.content for token in self._added.values() if token.content in self._control}) - TAGS)

    @functools.cached_property
    def _aliased(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """A backend that encodes special tokens as text and has their aliases in their place; the aliases, and the ids that
        these stand for."""
        stored = json.loads(self.backend.to_str())
        for token in stored["added_tokens"]:
            token["special"] = bool(self._special.fullmatch(token["content"]))
        backend = tokenizers.Tokenizer.from_str(json.dumps(stored))
        backend.encode_special_tokens = True
        aliases, ids = {}, {}
        for i, token in self._added.items():
            if self._special.fullmatch(token.content):
                alias = aliases[token.content] = _ALIAS.format(i)
                like = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
                backend.add_tokens([AddedToken(alias, special=False, **like)])
                ids[backend.token_to_id(alias)] = i
        return backend, aliases, ids

    def save(self, folder: str | os.PathLike) -> None:
        """Writes what `load_tokenizer` reads: `export`'s files and the frame."""
        self.export(folder)
        frame = dataclasses.asdict(self.frame) | ({"files": self.files} if self.files else {})
        write_atomically(Path(folder) / "chat_frame.json", json.dumps(frame, indent=2) + "\n")

    def export(self, folder: str | os.PathLike) -> None:
        """Writes what transformers' `AutoTokenizer` reads: the model's own files, or a tokenizer trained here."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.files:
            if self.folder.resolve() != folder.resolve():
                shutil.copyfile(self.folder / name, folder / name)
        if "tokenizer.json" not in self.files:
            self.backend.save(str(folder / "tokenizer.json"))
        if not self.files:
            about = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": self.frame.stop,
                "pad_token": _PAD if self.backend.token_to_id(_PAD) is not None else self.frame.stop,
                "chat_template": self.frame.template(),
            }
            write_atomically(folder / "tokenizer_config.json", json.dumps(about, indent=2) + "\n")


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
    return ChatTokenizer(backend, ChatFrame(head="", reply=_AGENT, between="", stop=_END), {"pad": _PAD})


def compose_embedding(embedding: np.ndarray, tokenizer: ChatTokenizer, seed: int) -> np.ndarray:
    """The embedding [V, D] with each numbered thing's row set to that of its noun plus that of its number.

    A model that starts from here sees at once that "apple 2" is an apple, which from random rows it would have to learn for
    every thing apart. The sum is scaled to keep the rows' norm.
    """
    rng = keys.generator(seed, "embedding")
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
        UserError: the folder holds no readable tokenizer, or its chat template has no frame.
    """
    tokenizer = ChatTokenizer(*tokenizer_files.read(Path(folder)))
    if tokenizer.decode(tokenizer.encode(_SAMPLE)) != _SAMPLE:
        raise UserError(f"The tokenizer in {folder} cannot encode {_SAMPLE!r}; copy tokenizer.json from the model's publisher.")
    return tokenizer
