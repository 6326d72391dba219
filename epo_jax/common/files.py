"""Paths as people write them, and files that a reader, or a crash, never meets half written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from epo_jax.common.errors import UserError, explain

# What helps where the cache cannot be written.
OTHER_CACHE = "make room or give the permission there, or set EPO_JAX_DATA or config.env.data_dir to another folder"


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


@contextlib.contextmanager
def from_cache(path: Path, again: str) -> Iterator[None]:
    """Context that reads a file of the cache. Raises UserError, naming the file and the true error, if that fails.

    Args:
        again: what happens if the file is not there, as "they are played again".
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read {explain(error, f'move it away and {again}')}.") from None


def cache_folder(data_dir: str = "") -> Path:
    """Where games, gold actions and converted models are kept: `data_dir`, else $EPO_JAX_DATA, else ~/.cache/epo_jax.

    Raises:
        UserError: there is no home folder for it.
    """
    for path, option in ((data_dir, "config.env.data_dir"), (os.environ.get("EPO_JAX_DATA"), "EPO_JAX_DATA")):
        if path:
            return expand_user(path, option).absolute()
    try:
        return Path("~/.cache/epo_jax").expanduser()
    except RuntimeError:
        raise UserError(
            "there is no home folder for the cache (HOME is not set, and the user has no entry); set EPO_JAX_DATA to a folder."
        ) from None


def append(path: Path, text: str) -> None:
    """Adds `text` to the end of a file, on disk when this returns: all of it or, where that fails, none.

    Raises:
        OSError: the file system refuses, with the file's name.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                left = memoryview(text.encode())
                while left:  # a file system with little room may take a part
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


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
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)
