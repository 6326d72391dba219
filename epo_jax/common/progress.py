"""What a command is doing and how long it will take, while it prints nothing else.

    with shown("evaluation", total=120, unit="episodes") as reach:
        ...
        reach(30)      # so many are done

On a terminal, a line is drawn over and over, and erased at the end. Otherwise a line is written every 30 s. Both go to standard
error, from a thread, so that they appear while XLA compiles too; the output proper is the same with and without them.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator

_TICK = 0.5  # seconds between two drawings on a terminal, the first one included
_EVERY = 30.0  # seconds between two lines elsewhere
_BAR = 24  # characters

_ERASE = "\r\033[K"

_open: "list[_Phase]" = []  # the innermost phase is shown


class _Phase:
    """One activity.

    Attributes:
        done: how much of `total` is done.
    """

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.began = time.monotonic()
        self.ended = threading.Event()

    def reach(self, done: int) -> None:
        """Records that `done` of the total are done."""
        self.done = done

    def show(self, live: bool) -> None:
        """Body of the thread: draws or writes until the phase ends."""
        while not self.ended.wait(_TICK if live else _EVERY):
            if _open and _open[-1] is self:
                text = line(self.what, self.done, self.total, self.unit, time.monotonic() - self.began, bar=live)
                _write(f"{_ERASE}{text}" if live else f"{text}\n")


@contextlib.contextmanager
def shown(what: str, total: int = 0, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Context of an activity that may take long; yields a function that takes how much of `total` is done.

    On several hosts, the first process alone shows it.
    """
    phase, live = _Phase(what, total, unit), _is_terminal()
    if not _is_first():
        yield phase.reach
        return
    thread = threading.Thread(target=phase.show, args=(live,), name="progress", daemon=True)
    _open.append(phase)
    thread.start()
    try:
        yield phase.reach
    finally:
        phase.ended.set()
        thread.join()
        _open.remove(phase)
        if live:
            _write(_ERASE)


def clear() -> None:
    """Erases the live line; call it before something is printed inside `shown`."""
    if _open and _is_terminal():
        _write(_ERASE)


def line(what: str, done: int, total: int, unit: str, seconds: float, bar: bool) -> str:
    """The line of an activity after some seconds: "evaluation  30 of 120 episodes  0:10, about 0:30 left"."""
    if not total:
        return f"{what}  {clock(seconds)}"
    filled = min(_BAR, _BAR * done // total)
    drawn = f"[{'#' * filled}{'.' * (_BAR - filled)}]  " if bar else ""
    left = f", about {clock(seconds / done * (total - done))} left" if done else ""
    return f"{what}  {drawn}{done:,} of {total:,} {unit}  {clock(seconds)}{left}"


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _is_first() -> bool:
    """Whether this process shows anything; does not import JAX."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed terminal, or none
        sys.stderr.write(text)
        sys.stderr.flush()
