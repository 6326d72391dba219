"""Paths as people write them, and files that a reader, or a crash, never meets half written."""

import os
from pathlib import Path

from epo_jax.errors import UserError


def expand_user(path: str | Path, option: str) -> Path:
    """`path` with a leading `~` or `~name` replaced by that home folder, which shells leave alone behind `--option=`.

    Args:
        option: name of the option, config key or variable that holds the path, for the message.

    Raises:
        UserError: there is no such user, or no home folder (HOME is unset and the user has no entry).
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{option}={path}: there is no home folder {Path(path).parts[0]}; write the path in full.") from None


def write_atomically(path: Path, text: str) -> None:
    """Puts `text` at `path` by writing beside it and renaming over it."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
