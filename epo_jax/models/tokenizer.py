"""Token in, token out: a tokenizer with its chat frame.

The frame turns observations into prompt ids. A conversation is append-only: `first(text)` opens it, the model answers up to
its stop token, `following(text)` adds the next observation. Earlier turns are never tokenized again, so the learner sees
exactly the ids that the sampler saw.
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

# Text games name objects like "cabinet 3" and use fixed phrases between the names. A piece is a noun with its number, or the
# words between two such names, and BPE can make one token of it: a small model then copies an object in one step, and episodes
# are half as long. No numbered object follows a task ("put some apple in fridge"), so its words remain separate. (The limit of
# 400 prevents a search to the end of a long text without numbers at each word.)
_PIECES = r" ?\p{L}+ \d+|[^\d\n]{1,400}?(?= \p{L}+ \d)| ?\p{L}+| ?\d+|\s+| ?[^\s\p{L}\d]+"

# A text that every tokenizer of an English model reproduces.
_SAMPLE = "Take apple 1 from the table."

# The name of a control token while text is encoded; U+10FFFD is for private use. Such a name in a text loses its first
# character.
_ALIAS = "\U0010fffd{}\U0010fffd"
_ALIAS_START = re.compile("\U0010fffd(?=\\d+(?:\U0010fffd|\\Z))")


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
    """A `tokenizers.Tokenizer` with the chat frame of its model.

    Control tokens are in the frame, end a turn, or pad; all other tokens are text.

    Attributes:
        roles: control tokens that need not be in the frame, as far as they exist: {"pad": ..., "bos": ...}.
        folder, files: the folder and names of the model's published files; None and () for a tokenizer trained here.
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
        """All tokens that end a turn, first that of the template."""
        return tuple(self.backend.token_to_id(token) for token in (self.frame.stop, *self.frame.stops))

    @property
    def role_ids(self) -> dict[str, int]:
        """The ids of `roles`."""
        return {role: self.backend.token_to_id(token) for role, token in self.roles.items()}

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without control tokens.

        The name of a control token is encoded as characters.
        """
        return self._framed("", text, "")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without control tokens; invalid UTF-8 becomes U+FFFD."""
        return self.backend.decode([i for i in ids if i not in self._control_ids], skip_special_tokens=False)

    def first(self, text: str) -> list[int]:
        """Ids that open a conversation, up to the model's turn."""
        return self._framed(self.frame.head, self.frame.message(text), self.frame.reply)

    def following(self, text: str, last: int | None) -> list[int]:
        """Ids of a later observation up to the model's turn.

        Args:
            last: the last token of the model's turn. If it is not the template's stop token (the budget or another stop token
                ended the turn), the template's is added.
        """
        ids = self._framed(self.frame.stop + self.frame.between, self.frame.message(text), self.frame.reply)
        return ids[1:] if last == self.stop_id else ids

    def answer(self, text: str) -> list[int]:
        """Ids of a model's turn after `frame.reply`, including the stop token."""
        frame = self.frame
        text = frame.answer_start + text + frame.answer_end
        prompt, whole = self._framed(frame.reply, "", ""), self._framed(frame.reply, text, frame.stop)
        # A prompt is encoded before its answer is known, so no token may span both.
        return whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._framed("", text, frame.stop)

    def _framed(self, before: str, text: str, after: str) -> list[int]:
        """Ids of `text` between parts of the frame; only the frame has control tokens.

        All is encoded at once, because tokens may span frame and text, as in the rendered template.
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
        """Matches tokens that a text must not produce."""
        special = {token.content for token in self._added.values() if token.special}
        return find_tokens((special | {token.content for token in self._added.values() if token.content in self._control}) - TAGS)

    @functools.cached_property
    def _aliased(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """(backend, aliases, ids): a backend that encodes special tokens as text and their aliases as tokens.

        `aliases` maps a token to its alias, `ids` the id of an alias to that of its token.
        """
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
        """Writes the files of `export` and the frame, for `load_tokenizer`."""
        self.export(folder)
        frame = dataclasses.asdict(self.frame) | ({"files": self.files} if self.files else {})
        write_atomically(Path(folder) / "chat_frame.json", json.dumps(frame, indent=2) + "\n")

    def export(self, folder: str | os.PathLike) -> None:
        """Writes the tokenizer for transformers.

        These are the published files of the model, or those of a tokenizer trained here.
        """
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
    """Trains a byte-level BPE of at most `vocab_size` tokens; deterministic.

    A match of the regular expression `phrases` may become one token, whitespace included; elsewhere words remain separate.
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
    """An embedding [V, D] that composes the rows of numbered objects.

    The row of an object is that of its noun plus that of its number. A model that starts from it sees at once that "apple 2"
    is an apple; with random rows it would have to learn that for every object. The sum is scaled to preserve the norm of
    rows.
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
    """The tokenizer of a run folder or a Hugging Face model folder.

    The chat template of a model gives the frame.

    Raises:
        UserError: the folder has no readable tokenizer, or its chat template has no frame.
    """
    tokenizer = ChatTokenizer(*tokenizer_files.read(Path(folder)))
    if tokenizer.decode(tokenizer.encode(_SAMPLE)) != _SAMPLE:
        raise UserError(f"The tokenizer in {folder} cannot encode {_SAMPLE!r}; copy tokenizer.json from the model's publisher.")
    return tokenizer
