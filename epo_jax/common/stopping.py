"""Stopping a command: on Ctrl-C, SIGTERM, SIGHUP (a closed terminal) and a closed standard output.

Every command runs inside `listening` (`command.run`). The first signal raises KeyboardInterrupt in the main thread, so files and
worker processes are closed on the way out. If a run would lose something, its `StopRequest` defers the interrupt until everything
is saved. A second signal ends the process at once, worker processes included.

Python runs signal handlers between two bytecode instructions of the main thread, and XLA may compile for minutes within one.
Signal numbers therefore also go through a pipe (`signal.set_wakeup_fd`) to a thread, which prints a message at once and ends the
process if the main thread does not return.
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

CODE = 75  # exit code of a stopped command, which can be repeated or resumed (sysexits.h: try again)
CLOSED_OUTPUT = 128 + signal.SIGPIPE  # exit code with nothing to save, as a shell reports death by this signal

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ASKED = "asked to stop: what is done will be saved; ask again to end at once"
_ECHO = 1.0  # seconds: a shell, a wrapper and the kernel may each send a signal for one request
_PATIENCE = 2.0  # seconds: a main thread that takes longer is inside a call that will not end soon

# Process groups led by child processes; `end_at_once` kills them.
process_groups: set[int] = set()

_listener: "_Listener | None" = None


class _Listener:
    """The state of stop requests to this process.

    Attributes:
        asked: a request has come.
        saving: the command will save its work before it stops.
        deferring: a request does not interrupt the main thread.
        raised: KeyboardInterrupt has been raised in the main thread.
        again: the interrupt was lost and must be raised again.
        output_closed: the reader of standard output has gone.
        sentence: returns the last line of a run, which can be resumed; None in other commands.
    """

    def __init__(self):
        self.again = False
        self.asked = self.saving = self.deferring = self.raised = self.output_closed = False
        self.sentence: Callable[[], str] | None = None

    def interrupt(self, _: int | None = None, frame: FrameType | None = None) -> None:
        """Handles a signal in the main thread: raises KeyboardInterrupt unless it is deferred."""
        self.asked = True
        if frame is not None and frame.f_code is _Listener.lost.__code__:
            self.again = True
        elif not self.deferring and not self.raised:
            self.raised = True
            raise KeyboardInterrupt

    def lost(self, before: Callable, unraisable) -> None:
        """Hook for unraisable exceptions.

        An interrupt inside a garbage-collector callback or `__del__` is lost; the thread sends it again after the callback.
        """
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
        """Body of the thread: reads signal numbers until the pipe is closed."""
        first = since = asked_by = None
        nudged = False
        while True:
            ready, _, _ = select.select([pipe], [], [], _PATIENCE / 10 if first is not None else None)
            number = os.read(pipe, 1) if ready else None
            if number == b"":
                return
            if number is None:
                waits = not self.deferring and not self.raised
                # A signal that another thread received, or that came just before a system call, does not end that call, so
                # send one to the main thread.
                if self.again or (waits and not nudged):
                    first, self.again, nudged = time.monotonic(), False, True
                    # Its number comes through the pipe too and counts as an echo.
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
    """Context in which signals stop the command, as the module describes.

    Nested contexts and contexts outside the main thread change nothing. Ignored signals (nohup) stay ignored.
    """
    global _listener
    if _listener is not None or threading.current_thread() is not threading.main_thread():
        yield _listener or _Listener()
        return
    handled = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    reading, writing = os.pipe()
    listener = _Listener()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=listener.watch, args=(reading,), name="signals", daemon=True)
    thread.start()
    before = {number: signal.signal(number, listener.interrupt) for number in handled}
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
    """Stop requests to a run, which saves its work before it stops.

    A signal raises KeyboardInterrupt until `defer` is called; then it only sets `asked`, except inside `now`. With several
    processes (`jax.distributed`), all must stop after the same step: `now` defers as well, the processes exchange `asked_here`,
    and SIGTERM belongs to the preemption service (`CheckpointManager.reached_preemption`).

    Args:
        workdir: the run folder, for the last line.
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
        """Whether this process must stop and is the only one of its run."""
        return self.asked_here and not _among_others()

    @property
    def asked_here(self) -> bool:
        return self._listener.asked

    def sentence(self, done: str = "") -> str:
        """Returns the last line of the output; `done` is what was finished."""
        if not (self._workdir / "config.json").exists():
            return "stopped as asked before the run began; the same command begins it, and what was made of its data is kept"
        return f"stopped as asked{done and ', ' + done}; go on with --workdir={self._workdir} --resume"

    def defer(self) -> None:
        """From here on, a signal sets `asked` and interrupts only inside `now`."""
        self._listener.saving = self._listener.deferring = True

    @contextlib.contextmanager
    def now(self) -> Iterator[None]:
        """Context in which a signal raises KeyboardInterrupt, even one that came before."""
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
        """`now` for work that can be abandoned; if it is interrupted, `end` saves and raises `Stopped`."""
        try:
            with self.now():
                yield
        except KeyboardInterrupt:
            end()


def _among_others() -> bool:
    """Whether this process is one of several; does not import JAX."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


class Output:
    """A text stream that turns a closed pipe or terminal (`| head`) into a stop request."""

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
            # Python flushes the stream's buffer when it closes it.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._listener.close_output()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def end_at_once(code: int) -> None:
    """Kills the child process groups and exits without finalizing the interpreter.

    Finalization while another thread compiles ends in a segmentation fault.
    """
    for group in list(process_groups):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def _tell(sentence: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{sentence}\n".encode())  # `print` may hold a lock or half a line
