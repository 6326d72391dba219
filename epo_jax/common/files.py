"""Paths with `~`, the cache folder, and files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from epo_jax.common.errors import UserError, explain

# Advice if the cache cannot be written.
OTHER_CACHE = "make room or give the permission there, or set EPO_JAX_DATA or config.env.data_dir to another folder"


def expand_user(path: str | Path, option: str) -> Path:
    """Replaces a leading `~` or `~name` by that home folder; shells do not expand it in `--option=~/x`.

    Args:
        option: the option, config key or variable that holds the path, for the message.

    Raises:
        UserError: the user does not exist or has no home folder (HOME is unset and the user has no entry).
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{option}={path}: there is no home folder {Path(path).parts[0]}; write the path in full.") from None


@contextlib.contextmanager
def from_cache(path: Path, again: str) -> Iterator[None]:
    """Context that reads a file of the cache.

    Args:
        again: what happens if the file is missing, for the message: "they are played again".

    Raises:
        UserError: reading fails; names the file and the true error.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read {explain(error, f'move it away and {again}')}.") from None


def cache_folder(data_dir: str = "") -> Path:
    """Returns the cache folder: `data_dir`, else $EPO_JAX_DATA, else ~/.cache/epo_jax.

    It holds games, gold episodes, converted models and compiled programs.

    Raises:
        UserError: there is no home folder.
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


def write_to_cache(path: Path, content: str | bytes) -> None:
    """Writes a file of the cache atomically, with its folders. Raises UserError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; {OTHER_CACHE}.") from None


def child_environment(**more: str) -> dict[str, str]:
    """Returns environment variables for a child process that imports this package."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **more, "PYTHONPATH": path}


def append(path: Path, text: str) -> None:
    """Appends `text` to a file and syncs it to disk; if that fails, nothing is appended.

    Raises:
        OSError: the file cannot be written; `filename` is set.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                left = memoryview(text.encode())
                while left:  # a file system with little room writes only a part
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes `content` to a temporary file next to `path` and renames it to `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
