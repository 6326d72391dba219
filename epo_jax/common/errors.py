"""Errors that end a command with one sentence, and sentences for library errors."""

import datetime
import difflib
import re
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

# Errors of the machine: a pattern of the libraries' messages, and advice.
_MACHINE = (
    (r"Too many open files", "raise the limit on open files (ulimit -n 65536)"),
    (r"RESOURCE_EXHAUSTED|[Oo]ut of memory|Cannot allocate memory|MemoryError|bad_alloc",
     "free memory, or use more or larger devices (config.mesh)"),
    (r"Permission denied|PERMISSION_DENIED|Operation not permitted|[Ff]orbidden", "give this user the permission to read it"),
    (r"No space left|[Qq]uota exceeded", "free some space and try again"),
    (r"Stale file handle|Input/output error|Transport endpoint|Host is down|UNAVAILABLE|DEADLINE_EXCEEDED|"
     r"[Tt]imed? ?out|Connection|[Nn]etwork is|HTTP\D{0,40}\b5\d\d\b|Name or service not known|Temporary failure",
     "check that the file system or the network answers, and try again"),
)  # fmt: skip


class UserError(Exception):
    """Bad input: a config value, a file, a folder, a missing program.

    The message is one sentence that names the cause and the fix. Commands print it without a traceback and exit with code 2.
    """


class Stopped(Exception):
    """A signal stopped the run, which is saved and can be resumed. Commands print the message and exit with code 75."""


def explain(error: BaseException, otherwise: str) -> str:
    """Returns "(REASON); ADVICE" for an error of a library.

    The reason is an error of the machine (a full disk, a timeout) if the error or one of its causes is one.

    Args:
        otherwise: the advice if the machine is not the cause, so that the file itself must be damaged.
    """
    for each in _chain(error):
        text = f"{type(each).__name__}: {each}"
        for pattern, advice in _MACHINE:
            if found := re.search(pattern, text):
                start = text.rfind("\n", 0, found.start()) + 1
                return f"({_line(text[start:])}); {advice}"
    while error.__cause__ is not None:
        error = error.__cause__
    return f"({_line(str(error) if isinstance(error, UserError) else f'{type(error).__name__}: {error}')}); {otherwise}"


def full_disk(error: BaseException) -> str | None:
    """Returns a sentence if a full file system, a quota or a file size limit caused `error`, else None."""
    for each in _chain(error):
        if found := re.search(r"No space left on device|[Qq]uota exceeded|File too large", str(each)):
            quoted = re.search(r'"(/[^"]+)"', str(each))  # in messages of libraries that are not written in Python
            where = getattr(each, "filename", None) or (quoted[1] if quoted else "a file")
            return f"{where} cannot be written ({found[0]}); make room there and repeat the command, that of a run with --resume."
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " (nearest: 'NAME')" if a name in `known` is spelled like `name`, else ""."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (nearest: {near[0]!r})" if near else ""


def keep_traceback(error: BaseException, folder: Path | None = None) -> Path:
    """Appends a traceback to `folder`/errors.log, or to a temporary file, and returns its path."""
    text = "".join([f"{datetime.datetime.now().isoformat(timespec='seconds')}\n", *traceback.format_exception(error), "\n"])
    if folder is not None:
        path = Path(folder) / "errors.log"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
            return path
        except OSError:
            pass
    with tempfile.NamedTemporaryFile("w", prefix="epo_jax-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(text)
    return Path(file.name)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error, the errors of its group, and their causes."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                yield from _chain(each)
        error = error.__cause__ or error.__context__


def _line(text: str) -> str:
    """Returns the first line that is not empty, cut to 200 characters."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return lines[0][:200].rstrip(".: ") if lines else "no message"
