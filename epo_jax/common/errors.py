"""What ends a command without a traceback, and how an error of a library or the machine is told in a sentence."""

import datetime
import difflib
import re
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

# Errors of the machine, by what libraries write of them, and what helps.
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

    The message is one sentence that names the culprit and the mend. Commands print it and exit with code 2 instead of
    showing a traceback.
    """


class Stopped(Exception):
    """The run was asked to stop, has saved all it needs, and can be resumed. Commands print it and exit with code 75."""


def explain(error: BaseException, otherwise: str) -> str:
    """The end of a message, "(REASON); WHAT TO DO", for an error of a library.

    The reason is an error of the machine (memory, disk, ...) if there is one in the chain.

    Args:
        otherwise: what to do if the machine is not at fault, so that the file itself must be.
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
    """A sentence if a full file system, quota or limit on a file's size is behind `error`, else None."""
    for each in _chain(error):
        if found := re.search(r"No space left on device|[Qq]uota exceeded|File too large", str(each)):
            quoted = re.search(r'"(/[^"]+)"', str(each))  # by libraries that are not written in Python
            where = getattr(each, "filename", None) or (quoted[1] if quoted else "a file")
            return (
                f"{where} cannot be written ({found[0]}); make room there and give the command again, that of a run with "
                "--resume."
            )
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message, " (nearest: 'NAME')", if `name` resembles one of `known`, else ""."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (nearest: {near[0]!r})" if near else ""


def keep_traceback(error: BaseException, folder: Path | None = None) -> Path:
    """Appends the traceback of `error` to `folder`/errors.log, or to a new temporary file where that cannot be written."""
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
    """The error, those in its group, and what it came from."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                yield from _chain(each)
        error = error.__cause__ or error.__context__


def _line(text: str) -> str:
    """The first line that is not empty, short enough for a sentence."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return lines[0][:200].rstrip(".: ") if lines else "no message"
