"""Reads the tokenizer files of a model folder or a run folder.

Any fault is a UserError of one sentence.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from epo_jax.common.errors import UserError
from epo_jax.models.chat_frame import ChatFrame, UnusableTemplate, frame_of_template

# The files of a tokenizer, and of the sampling defaults, in a model folder.
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip

_TOGETHER = "copy both files from the same folder"


def read(folder: Path) -> tuple[tokenizers.Tokenizer, ChatFrame, dict[str, str], Path, tuple[str, ...]]:
    """(tokenizer, frame, tokens by role, folder, published files).

    The roles are "pad" and "bos"; the files are the names of those that the model's publisher has written. The frame is the
    one that a run has stored, or that of the chat template.

    Raises:
        UserError: see `epo_jax.models.tokenizer.load_tokenizer`.
    """
    stored = folder / "chat_frame.json"
    if stored.exists():
        frame, own = _stored_frame(stored)
        backend = _backend(folder)
    else:
        pretrained, backend = _pretrained(folder)
        frame, own = _frame_of_template(pretrained, backend, folder), _FILES
    files = tuple(name for name in _FILES if name in own and (folder / name).is_file())
    # A tokenizer may have been saved with the settings of a batch.
    backend.no_truncation()
    backend.no_padding()
    for token in (frame.stop, *frame.stops):
        if backend.token_to_id(token) is None:
            raise UserError(f"{stored} names the stop token {token!r}, which {folder / 'tokenizer.json'} lacks; {_TOGETHER}.")
    return backend, frame, _named(folder, backend, "pad", "bos"), folder, files


def _reason(error: Exception) -> str:
    """The error of another library as one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _settings(path: Path) -> dict:
    """The table in a JSON file; {} if there is no file."""
    if not path.exists():
        return {}
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({_reason(error)}); copy it from the model's publisher.") from error
    if not isinstance(stated, dict):
        raise UserError(f"{path} holds no table of settings; copy it from the model's publisher.")
    return stated


def _stored_frame(path: Path) -> tuple[ChatFrame, tuple[str, ...]]:
    """The frame that `ChatTokenizer.save` wrote, and the names of the model's published files."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
        return ChatFrame(**{key: value for key, value in stated.items() if key != "files"}), tuple(stated.get("files", ()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as a chat frame ({_reason(error)}); copy it from another run of the same model, or from a "
            "copy of this folder."
        ) from error


def _backend(folder: Path) -> tokenizers.Tokenizer:
    """`folder`/tokenizer.json with the added tokens that only other files list, like transformers."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"No tokenizer can be read from {folder}: tokenizer.json is missing; copy it there.")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise UserError(
            f"{path} cannot be read by tokenizers {tokenizers.__version__} ({_reason(error)}); install the version that wrote "
            "it, or copy the file from the model's publisher."
        ) from error
    for i, token in _listed(folder):
        if token.content not in _added(backend):
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != i:
                raise UserError(
                    f"{folder}: tokenizer.json has no room for token {token.content!r} at id {i}, where the folder's other "
                    f"files place it; {_TOGETHER}."
                )
    # Tokens with a role that are text in the vocabulary: transformers makes special tokens of them.
    named = _named(folder, backend, "eos", "bos", "pad", "unk").values()
    backend.add_special_tokens([token for token in named if token not in _added(backend)])
    return backend


def _listed(folder: Path) -> list[tuple[int, AddedToken]]:
    """The added tokens in added_tokens.json and tokenizer_config.json, in the order of their ids."""
    listed = {}
    try:
        for content, i in _settings(folder / "added_tokens.json").items():
            listed[int(i)] = AddedToken(content, special=True)
        for i, token in (_settings(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
            flags = {flag: bool(token.get(flag)) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            listed[int(i)] = AddedToken(token["content"], **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: added_tokens.json, or added_tokens_decoder in tokenizer_config.json, is no list of tokens by id "
            f"({_reason(error)}); copy it from the model's publisher."
        ) from error
    return sorted(listed.items())


def _added(backend: tokenizers.Tokenizer) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values()}


def _named(folder: Path, backend: tokenizers.Tokenizer, *roles: str) -> dict[str, str]:
    """Role -> token, from the folder's files; only tokens of the vocabulary."""
    stated = _settings(folder / "special_tokens_map.json") | _settings(folder / "tokenizer_config.json")
    tokens = {role: stated.get(f"{role}_token") for role in roles}
    tokens = {role: token.get("content") if isinstance(token, dict) else token for role, token in tokens.items()}
    return {role: token for role, token in tokens.items() if isinstance(token, str) and backend.token_to_id(token) is not None}


def _ends(folder: Path, backend: tokenizers.Tokenizer) -> set[str]:
    """The tokens that the model's files list as ends of a turn."""
    ends = set(_named(folder, backend, "eos").values())
    for path in (folder / "generation_config.json", folder / "config.json"):
        ids = _settings(path).get("eos_token_id")
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if not all(isinstance(i, int) and i >= 0 for i in ids):
            raise UserError(f"{path}: eos_token_id={ids!r} must be the id of a token, or a list of them.")
        ends |= {backend.id_to_token(i) for i in ids}
    return ends & _added(backend)  # the id of ordinary text is a library's default


def _pretrained(folder: Path):
    """(tokenizer of transformers, backend).

    The backend is read from tokenizer.json if there is one, because transformers rebuilds the pre-tokenizers of some families.
    """
    slow = ("vocab.json", "merges.txt")
    fast = (folder / "tokenizer.json").exists()
    if not fast and not (folder / "tokenizer.model").exists() and not all((folder / name).exists() for name in slow):
        raise UserError(
            f"No tokenizer can be read from {folder}: it holds no tokenizer.json (nor vocab.json with merges.txt, nor "
            "tokenizer.model); copy the tokenizer's files there."
        )
    backend = _backend(folder) if fast else None
    _settings(folder / "tokenizer_config.json")
    from transformers import AutoTokenizer  # seconds to import, and only a pretrained model needs it

    try:
        pretrained = AutoTokenizer.from_pretrained(str(folder))
        converted = pretrained.backend_tokenizer
    except Exception as error:  # transformers, tokenizers and sentencepiece have no common base
        raise UserError(
            f"No tokenizer can be read from {folder} ({_reason(error)}); a model folder needs tokenizer.json and "
            "tokenizer_config.json."
        ) from error
    if fast:
        return pretrained, backend
    # transformers makes up an id for a token that it expects and does not find.
    stated = {token.content: i for i, token in _listed(folder)} | converted.get_vocab(with_added_tokens=False)
    for token in sorted(_added(converted)):
        if stated.get(token) != converted.token_to_id(token):
            raise UserError(
                f"{folder}: no file gives token {token!r} its id; copy tokenizer.json, or a tokenizer_config.json with "
                "added_tokens_decoder, from the model's publisher."
            )
    return pretrained, converted


def _frame_of_template(pretrained, backend: tokenizers.Tokenizer, folder: Path) -> ChatFrame:
    def render(messages: list[dict[str, str]], generate: bool) -> str:
        return pretrained.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)

    fix = "set chat_template and eos_token in its tokenizer_config.json"
    if not pretrained.chat_template:
        raise UserError(f"{folder} has no chat template, as a base model; {fix}, or take the model's chat variant.")
    try:
        return frame_of_template(render, _added(backend), _ends(folder, backend))
    except UnusableTemplate as error:
        raise UserError(f"{folder}: its chat template {error}; {fix}.") from error
    except UserError:
        raise
    except Exception as error:  # whatever the template raises
        raise UserError(f"{folder}: its chat template cannot be rendered ({_reason(error)}); {fix}.") from error
