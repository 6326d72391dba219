"""The processes of a run on several hosts, all running one program.

There is one process per host. Every process plays its share of the episodes with its own worker processes and devices, and
stores its own shards of the arrays. Only the first process prints and writes results; all take part in checkpoints. The
number of processes does not change what a run learns.

A process that dies would leave the others waiting forever. JAX's coordination service receives heartbeats from every process;
a thread of each process asks it which processes are alive, and ends its own process with a message when one is missing. A
process that fails with an error sends the message to the others in place of what they wait for in `gather`.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from epo_jax.common import stopping
from epo_jax.common.errors import Stopped, UserError
from epo_jax.parallel.mesh import devices_in_use

Item = TypeVar("Item")

# Seconds without a heartbeat after which a process counts as dead, and between two checks of the others.
_SILENCE = 30
_CHECK = 1.0

# Seconds that a failed process waits for the others to take its message, and then to be seen leaving.
_FAREWELL = 5.0
_LEAVE = 2.0

# Seconds by which the first process outlives a failure of another: JAX aborts every process that is still there without it.
_LAST = 5.0

_OPTIONS = (
    ("coordinator", str, "HOST:PORT of the first process of several."),
    ("processes", int, "How many processes there are."),
    ("process", int, "Which of them this one is, from 0."),
)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the options that name the processes of the run.

    Cloud TPU needs none of them.
    """
    define: dict[type, Callable] = {str: flags.DEFINE_string, int: flags.DEFINE_integer}
    for name, kind, about in _OPTIONS:
        define[kind](name, None, about, flag_values=values)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `define_flags` to a parser."""
    for name, kind, about in _OPTIONS:
        parser.add_argument(f"--{name}", type=kind, help=about)


@contextlib.contextmanager
def joined(values: flags.FlagValues | argparse.Namespace) -> Iterator[None]:
    """Context of a run that connects its processes.

    Ends all processes if one fails. Enter it before any use of a device.

    Raises:
        UserError: the options do not fit together, or the processes do not find each other.
    """
    _connect(values.coordinator, values.processes, values.process)
    devices_in_use()  # or JAX's own error would come first
    if jax.process_count() == 1:
        yield
        return
    watch = _Watch()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if is_first() else nowhere):
            yield
        watch.leave()
    except Stopped:
        watch.leave()
        raise
    except (Exception, KeyboardInterrupt) as error:
        watch.fail(error)


def _connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if coordinator is None and processes is None and process is None:
        # Elsewhere JAX would see a cluster in what is one process of a Slurm job, and hide all its devices but one.
        if importlib.util.find_spec("libtpu") is None or "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu"):
            return
    else:
        for name, value in given.items():
            if value is None:
                raise UserError(f"--{name} is missing; --coordinator, --processes and --process go together.")
        if not 0 <= process < processes:
            raise UserError(f"--process={process} must be from 0 to {processes - 1}, as --processes={processes}.")
        if not coordinator.rpartition(":")[2].isdigit():
            raise UserError(f"--coordinator={coordinator} has no port; write it as HOST:PORT.")
    # Without this JAX aborts a process as soon as another one dies, before `_Watch` can name it.
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(
            coordinator, processes, process, cluster_detection_method="deactivate" if coordinator else None,
            heartbeat_timeout_seconds=_SILENCE, shutdown_timeout_seconds=60,
        )  # fmt: skip
    except ValueError:
        if coordinator:
            raise
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"The processes did not find each other ({reason}); start all of them within 5 minutes.") from None


def is_first() -> bool:
    """Whether this process is the one that prints and writes results."""
    return jax.process_index() == 0


def share(items: Sequence[Item]) -> Sequence[Item]:
    """The part of `items` that belongs to this process.

    Parts are consecutive, and their sizes differ by at most one.
    """
    first, last = (len(items) * i // jax.process_count() for i in (jax.process_index(), jax.process_index() + 1))
    return items[first:last]


def gather(value: Any) -> list[Any]:
    """`value` of every process, in the order of the processes.

    All processes must call this together, with anything that JSON can represent.
    """
    if jax.process_count() == 1:
        return [value]
    return [json.loads(message) for message in gather_bytes(json.dumps(value).encode())]


def gather_bytes(message: bytes) -> list[bytes]:
    """`message` of every process, in the order of the processes.

    All processes must call this together.
    """
    if jax.process_count() == 1:
        return [message]
    messages, failed = _exchange(message)
    if any(failed):
        process = failed.index(True)
        _end(f"process {process} {messages[process].decode()}")
    return messages


def _exchange(message: bytes, failed: bool = False) -> tuple[list[bytes], list[bool]]:
    """The message of every process, and whether it is about a failure."""
    sizes, failures = multihost_utils.process_allgather(np.array([len(message), failed], np.int32)).T
    # Padded to one of eight sizes below each power of two: each shape is a program of its own.
    most = int(sizes.max())
    step = 1 << max(0, most.bit_length() - 4)
    padded = np.zeros((most // step + 1) * step, np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    parts = multihost_utils.process_allgather(padded)
    return [part[:size].tobytes() for part, size in zip(parts, sizes, strict=True)], failures.astype(bool).tolist()


def agree(what: str, value: Any) -> None:
    """Raises UserError unless `value` is the same in every process.

    It is anything that JSON can represent.
    """
    digests = gather(hashlib.sha256(json.dumps(value).encode()).hexdigest())
    for process, digest in enumerate(digests):
        if digest != digests[0]:
            raise UserError(
                f"{what} of process {process} differ from those of process 0; start all with the same command, packages and data."
            )


def check_shared(folder: Path) -> None:
    """Raises UserError unless every process sees the first one's run folder."""
    gather(None)
    deadline = time.monotonic() + _SILENCE  # network file systems cache for a while that a file was missing
    while not (folder / "config.json").exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"--workdir={folder} is not one folder for all: process {jax.process_index()} does not see in it what process 0 "
                "wrote; name a folder that all hosts share."
            )
        time.sleep(1.0)


class _Watch:
    """A thread that ends this process when another one is no longer alive."""

    def __init__(self):
        self._leaving = threading.Event()
        self._hosts: dict[int, str] = {}
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        self._hosts = dict(enumerate(gather(os.uname().nodename)))

    def leave(self) -> None:
        """Ends the watch of all processes together.

        The first process, which coordinates, is the last to leave.
        """
        gather(None)
        self._leaving.set()
        gather(None)  # from here on every process expects the others to leave
        self._thread.join()
        if not is_first():
            jax.distributed.shutdown()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all processes because of an error in this one."""
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            # The cause may be another process that has died; then the thread names it and ends this process.
            time.sleep(_SILENCE + 5 * _CHECK)
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif isinstance(error, KeyboardInterrupt):
            print("stopped as asked, before a point at which all processes save; a run goes on with --resume", file=sys.stderr)
        else:
            traceback.print_exception(error)
        self._leaving.set()
        words = f"on {os.uname().nodename} failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        # The others get the message if they wait in `gather`. Everywhere else their threads notice that this process has left.
        farewell = threading.Thread(target=_exchange, args=(words.encode(), True), daemon=True)
        farewell.start()
        farewell.join(_FAREWELL)
        if not is_first():
            threading.Thread(target=jax.distributed.shutdown, daemon=True).start()
        time.sleep(_LEAVE)
        _exit(stopping.CODE if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, UserError) else 1)

    def _run(self) -> None:
        alive = {device.process_index for device in jax.devices()}
        # The coordination service answers when all living processes have asked; it ends with the first process.
        while not self._leaving.is_set() or is_first() and len(alive) > 1:
            try:
                with multihost_utils.live_devices(jax.devices()) as devices:
                    alive = {device.process_index for device in devices}
            except multihost_utils.ProcessFailureError as failure:
                if not self._leaving.is_set():
                    process = min(device.process_index for device in failure.failed_devices)
                    host = self._hosts.get(process, "its host")
                    _end(f"process {process} on {host} has failed, or has given no sign of life for {_SILENCE} s")
            except RuntimeError:
                if self._leaving.is_set():
                    return
                _end("process 0, which coordinates the run, does not answer")
            self._leaving.wait(_CHECK)


def _end(why: str) -> NoReturn:
    print(f"error: {why}; this process ends too. Fix it and start again, a run with --resume.", file=sys.stderr, flush=True)
    if is_first():
        time.sleep(_LAST)
    _exit(1)


def _exit(code: int) -> NoReturn:
    """Ends the process at once: a regular end would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
