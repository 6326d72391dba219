"""One process for each run folder: a lock that the kernel releases however its holder ends."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from epo_jax.common.errors import UserError

NAME = ".lock"  # holds "PID HOST"

# What a file system without locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_PATIENCE = 1.0  # seconds; `refuse` holds a lock for a moment


@contextlib.contextmanager
def hold(*folders: Path) -> Iterator[None]:
    """Context in which no other process can hold `folders`, on this host or, on a network file system with locks, on another.

    A folder that does not exist is created; if nothing else was written to it, it is removed at the end.

    Raises:
        UserError: another process holds one of them, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_hold(Path(folder)))
        yield


def refuse(folder: Path) -> None:
    """Raises UserError if a process holds `folder`; writes nothing."""
    try:
        descriptor = os.open(Path(folder) / NAME, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(folder, descriptor) from None
    except OSError:
        pass
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _hold(folder: Path) -> Iterator[None]:
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder, path)
    except OSError as error:
        _remove_empty(made)
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another folder.") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)
        _remove_empty(made)


def _acquire(folder: Path, path: Path) -> int:
    """The locked file's descriptor, which programs that this process starts do not inherit."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            error = _in_use(folder, descriptor)
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise error from None
            time.sleep(0.1)
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            print(f"{folder}: its file system has no locks, so nothing stops a second process from writing there.", flush=True)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:  # else the last holder removed it meanwhile
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} {os.uname().nodename}\n".encode())
                return descriptor
        os.close(descriptor)


def _in_use(folder: Path, descriptor: int) -> UserError:
    process, _, host = os.pread(descriptor, 200, 0).decode(errors="replace").strip().partition(" ")
    who = f"process {process} on {host}" if host else "another process"
    return UserError(f"{folder} is in use by {who}; wait until it ends, stop it, or choose another folder.")


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
