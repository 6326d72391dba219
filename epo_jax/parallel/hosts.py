"""The processes of a run on several hosts: one on each, all running the same program in step.

Every process plays its share of the episodes with its own worker processes and devices, and keeps its own slices of the arrays
that are spread over all devices. The first one alone prints and writes results; all take part in checkpoints. What a run
learns does not depend on their number.

A process that dies would leave the others waiting for it for ever: a thread of each gives signs of life through the coordination
service of `jax.distributed`, and ends its own process with a message when another has fallen silent or failed.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator, Sequence
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

# Seconds between signs of life; of silence after which a process is taken for dead; and where an exchange with it has failed.
_BEAT = 1.0
_SILENCE = 30.0
_SILENCE_AFTER_FAILURE = 5.0

_OPTIONS = (
    ("coordinator", str, "HOST:PORT of the first process of several."),
    ("processes", int, "How many processes there are."),
    ("process", int, "Which of them this one is, from 0."),
)

_ALIVE = "epo_jax/alive"
_DONE = "done"
_FAILED = "failed: "


def define_flags(values: flags.FlagValues) -> None:
    """The options that say which processes make up the run. On Cloud TPU they are found out."""
    define = {str: flags.DEFINE_string, int: flags.DEFINE_integer}
    for name, kind, about in _OPTIONS:
        define[kind](name, None, about, flag_values=values)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `define_flags`, for a program that parses its own."""
    for name, kind, about in _OPTIONS:
        parser.add_argument(f"--{name}", type=kind, help=about)


@contextlib.contextmanager
def joined(values: flags.FlagValues | argparse.Namespace) -> Iterator[None]:
    """Context of a run: connects the processes, and ends all of them when one of them fails. Before any use of a device.

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
        gather(None)  # the service ends with the first process, so that all go together
    except Stopped:
        gather(None)
        raise
    except (Exception, KeyboardInterrupt) as error:
        watch.fail(error)
    finally:
        watch.close()


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
    try:
        jax.distributed.initialize(
            coordinator, processes, process, cluster_detection_method="deactivate" if coordinator else None,
            heartbeat_timeout_seconds=int(_SILENCE + 20 * _BEAT), shutdown_timeout_seconds=60,
        )  # fmt: skip
    except ValueError:
        if coordinator:
            raise
    except RuntimeError as error:
        told = str(error).strip().splitlines()[0][:200]
        raise UserError(f"The processes did not find each other ({told}); start all of them within 5 minutes.") from None


def is_first() -> bool:
    """Whether this process is the one that prints and writes results."""
    return jax.process_index() == 0


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This process's part of `items`: as many for each, neighbours together."""
    first, last = (len(items) * i // jax.process_count() for i in (jax.process_index(), jax.process_index() + 1))
    return items[first:last]


def gather(value: Any) -> list[Any]:
    """`value`, anything that JSON can hold, of every process in their order. All must call this together."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(zlib.compress(json.dumps(value).encode(), level=1), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(own.size, np.int32))
    # In few shapes, each of which is a program of its own.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: own.size] = own
    parts = multihost_utils.process_allgather(padded)
    return [json.loads(zlib.decompress(part[:size].tobytes())) for part, size in zip(parts, sizes, strict=True)]


def agree(what: str, value: Any) -> None:
    """Raises UserError unless `value`, anything that JSON can hold, is the same in every process."""
    digests = gather(hashlib.sha256(json.dumps(value).encode()).hexdigest())
    for process, digest in enumerate(digests):
        if digest != digests[0]:
            raise UserError(
                f"{what} of process {process} differ from those of process 0; start all with the same command, packages and data."
            )


def check_shared(folder: Path) -> None:
    """Raises UserError unless every process sees the run folder that the first has made."""
    gather(None)
    patience = time.monotonic() + _SILENCE  # network file systems remember for a while that a file was not there
    while not (folder / "config.json").exists():
        if time.monotonic() > patience:
            raise UserError(
                f"--workdir={folder} is not one folder for all: process {jax.process_index()} does not see in it what process 0 "
                "wrote; name a folder that all hosts share."
            )
        time.sleep(1.0)


class _Watch:
    """The thread that gives this process's signs of life and looks for those of the others."""

    def __init__(self):
        # The coordination service has no public interface.
        from jax._src.distributed import global_state

        self._client = global_state.client
        self._own = f"{_ALIVE}/{jax.process_index()}"
        self._host = os.uname().nodename
        self._patience = _SILENCE
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """For a process that is through."""
        self._stop(_DONE)

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process with its error, and the others with word of it."""
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Perhaps because another process has died; then the thread soon knows which, and ends this one.
            self._patience = _SILENCE_AFTER_FAILURE
            time.sleep(_SILENCE_AFTER_FAILURE + 2 * _BEAT)
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif isinstance(error, KeyboardInterrupt):
            print("stopped as asked, before a point at which all processes save; a run goes on with --resume", file=sys.stderr)
        else:
            traceback.print_exception(error)
        with contextlib.suppress(RuntimeError):
            self._stop(f"{_FAILED}{type(error).__name__}: {' '.join(str(error).split())[:500]}")
            if is_first():  # the service ends with it: let the others read first
                time.sleep(2 * _BEAT)
        _exit(stopping.CODE if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, UserError) else 1)

    def _stop(self, last: str) -> None:
        self._closing.set()
        self._thread.join()
        self._say(last)

    def _say(self, what: str) -> None:
        self._client.key_value_set(self._own, f"{self._host} {what}", allow_overwrite=True)

    def _run(self) -> None:
        heard: dict[str, tuple[str, float]] = {}
        for beat in itertools.count():
            try:
                self._say(str(beat))
                said = dict(self._client.key_value_dir_get(_ALIVE))
            except RuntimeError:
                _end("process 0, which coordinates the run, does not answer")
            now = time.monotonic()
            for key, value in said.items():
                if key not in heard or heard[key][0] != value:
                    heard[key] = value, now
                host, _, last = value.partition(" ")
                name = f"process {key.rpartition('/')[2]} on {host}"
                if last.startswith(_FAILED):
                    _end(f"{name} {last}")
                elif last != _DONE and now - heard[key][1] > self._patience:
                    _end(f"{name} has given no sign of life for {self._patience:.0f} s")
            if self._closing.wait(_BEAT):
                return


def _end(why: str) -> NoReturn:
    print(f"error: {why}; this process ends too. Mend it and start again, a run with --resume.", file=sys.stderr, flush=True)
    _exit(1)


def _exit(code: int) -> NoReturn:
    """Ends the process at once: a regular end would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
