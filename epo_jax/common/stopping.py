"""Ending a command when it is asked to: by Ctrl-C, by SIGTERM, by SIGHUP (its terminal was closed), by a closed output.

Around every command `listening` is open (`command.run`). The first signal raises KeyboardInterrupt in the main thread, so that
files and worker processes are closed on the way out. Where something would be lost by that, a `StopRequest` defers it to a point
at which all is saved. A second signal ends the process at once, worker processes included.

Python runs its signal handlers between two instructions of the main thread, and XLA compiles for minutes in one. So the signals'
numbers go through a pipe (`signal.set_wakeup_fd`) to a thread, which answers at once, and ends the process where the main thread
does not come back.
"""

import contextlib
import errno
import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

CODE = 75  # of a command that was stopped and can be repeated or resumed (sysexits.h: try again)
CLOSED_OUTPUT = 128 + signal.SIGPIPE  # of one with nothing to save, as the shell reports the death by this signal

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ASKED = "asked to stop: what is done will be saved; ask again to end at once"
_ECHO = 1.0  # seconds: a shell, a wrapper and the kernel may each send the signal of one request
_PATIENCE = 2.0  # seconds after which the main thread is taken to be inside a call that does not end soon

# Ids of the process groups that child processes lead, to be ended with this process.
process_groups: set[int] = set()

_listener: "_Listener | None" = None


class _Listener:
    """What is known of the requests to stop this process.

    Attributes:
        asked: there was one.
        saving: what the command has done will be saved first.
        deferring: it does not interrupt the main thread.
        raised: it has interrupted it.
        again: that was in vain.
        output_closed: nobody reads standard output any more.
        sentence: makes the last line of a run, which can be resumed; None in other commands.
    """

    def __init__(self):
        self.again = False
        self.asked = self.saving = self.deferring = self.raised = self.output_closed = False
        self.sentence: Callable[[], str] | None = None

    def interrupt(self, _: int | None = None, frame: FrameType | None = None) -> None:
        """The Python side of a signal."""
        self.asked = True
        if frame is not None and frame.f_code is _Listener.lost.__code__:
            self.again = True
        elif not self.deferring and not self.raised:
            self.raised = True
            raise KeyboardInterrupt

    def lost(self, before: Callable, unraisable) -> None:
        """Hook for exceptions that have nobody to go to. An interrupt that came inside a garbage collector's callback or a
        `__del__` comes again after it: not from here, which is still inside."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            self.raised, self.again = False, True
        elif "Event loop is closed" not in str(unraisable.exc_value):  # Orbax's, after a save that failed
            before(unraisable)

    def close_output(self) -> None:
        self.output_closed = True
        if not self.asked:
            if self.saving:
                _tell(_ASKED)
            self.interrupt()

    def watch(self, pipe: int) -> None:
        """The thread that reads the signals' numbers until the pipe is closed."""
        first = since = asked_by = None
        nudged = False
        while True:
            ready, _, _ = select.select([pipe], [], [], _PATIENCE / 10 if first is not None else None)
            number = os.read(pipe, 1) if ready else None
            if number == b"":
                return
            if number is None:
                waits = not self.deferring and not self.raised
                # A signal that another thread got, or that came just before a system call, does not end that call: the main
                # thread gets one of its own.
                if self.again or (waits and not nudged):
                    first, self.again, nudged = time.monotonic(), False, True
                    # Its number comes through the pipe, too, and is taken for an echo.
                    signal.pthread_kill(threading.main_thread().ident, asked_by)
                elif waits and time.monotonic() > since + _PATIENCE:
                    _tell(self.last_line())
                    end_at_once(CODE)
            elif number[0] in _SIGNALS and first is None:
                first = since = time.monotonic()
                asked_by, self.asked = number[0], True
                if self.saving:
                    _tell(_ASKED)
            elif number[0] in _SIGNALS and time.monotonic() > first + _ECHO:
                end_at_once(128 + number[0])

    def last_line(self) -> str:
        return self.sentence() if self.sentence else "stopped as asked"


@contextlib.contextmanager
def listening() -> Iterator[_Listener]:
    """Has signals stop what runs inside, in the way of the module's docstring. Inside another one, or outside the main thread,
    it changes nothing. A signal that is ignored (nohup) stays so."""
    global _listener
    if _listener is not None or threading.current_thread() is not threading.main_thread():
        yield _listener or _Listener()
        return
    heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    reading, writing = os.pipe()
    listener = _Listener()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=listener.watch, args=(reading,), name="signals", daemon=True)
    thread.start()
    before = {number: signal.signal(number, listener.interrupt) for number in heard}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    hook, sys.unraisablehook = sys.unraisablehook, functools.partial(listener.lost, sys.unraisablehook)
    _listener = listener
    try:
        yield listener
    finally:
        _listener = None
        sys.unraisablehook = hook
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)
        thread.join()
        os.close(reading)


class StopRequest:
    """The part that a run takes in how it is stopped.

    A signal raises KeyboardInterrupt until `defer` is called; from then on it only sets `asked`, except inside `now`. Where
    `jax.distributed` is initialized, all processes must stop after the same step: `now` defers too, `asked_here` is for an
    exchange between them, and SIGTERM belongs to a preemption service (`CheckpointManager.reached_preemption`).

    Args:
        workdir: the run folder, for the sentence at the end.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir

    def __enter__(self) -> "StopRequest":
        self._stack = contextlib.ExitStack()
        self._listener = self._stack.enter_context(listening())
        self._listener.sentence = self.sentence
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()
        self._listener.saving = self._listener.deferring = False

    @property
    def asked(self) -> bool:
        """Whether this process is to stop, and may do so alone."""
        return self.asked_here and not _among_others()

    @property
    def asked_here(self) -> bool:
        return self._listener.asked

    def sentence(self, done: str = "") -> str:
        """What is printed at the end, with what was `done`."""
        if not (self._workdir / "config.json").exists():
            return "stopped as asked before the run began; the same command begins it, and what was made of its data is kept"
        return f"stopped as asked{done and ', ' + done}; go on with --workdir={self._workdir} --resume"

    def defer(self) -> None:
        """From here on a signal waits for a look at `asked`, or for `now`."""
        self._listener.saving = self._listener.deferring = True

    @contextlib.contextmanager
    def now(self) -> Iterator[None]:
        """Inside, a signal raises KeyboardInterrupt, also one that came before."""
        if _among_others():
            yield
            return
        before, self._listener.deferring = self._listener.deferring, False
        try:
            if self.asked:
                self._listener.interrupt()
            yield
        finally:
            self._listener.deferring = before

    @contextlib.contextmanager
    def now_or(self, end: Callable[[], None]) -> Iterator[None]:
        """`now` for what changes nothing and can be given up: after it `end` is called, which saves and raises `Stopped`."""
        try:
            with self.now():
                yield
        except KeyboardInterrupt:
            end()


def _among_others() -> bool:
    """Whether this is one of several processes. A program without JAX is not, and stays without."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


class Output:
    """A text stream whose reader may go away (`| head`, a closed terminal), which is then a request to stop."""

    def __init__(self, stream, listener: _Listener):
        self._stream, self._listener = stream, listener

    def write(self, text: str) -> int:
        with self._reader_may_leave():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._reader_may_leave():
            self._stream.flush()

    @contextlib.contextmanager
    def _reader_may_leave(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # What is still in the stream's buffer must go somewhere when Python closes it.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._listener.close_output()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def end_at_once(code: int) -> None:
    """Ends this process with its children, and nothing else: an interpreter that closes down under a thread that compiles ends
    in a segmentation fault."""
    for group in list(process_groups):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def _tell(sentence: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{sentence}\n".encode())  # print could be in the middle of a line
