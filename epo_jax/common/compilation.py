"""Compiled programs, kept on disk between commands (JAX's persistent compilation cache).

The keys are JAX's: the program, the versions of JAX and of the backend, the XLA flags, kind and number of the devices. A CPU's
programs are machine code for its instructions, so each kind of CPU has a folder of its own. A program from the cache is the
machine code that was compiled, so it computes the same bits.
"""

import contextlib
import hashlib
import os
import platform
import re
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import jax

from epo_jax.common.errors import UserError
from epo_jax.common.files import cache_folder

MAX_BYTES = 1 << 30
MIN_SECONDS = 0.1  # programs that compile faster are not kept


def keep_programs() -> None:
    """Turns the compilation cache on, in the cache folder.

    JAX's own variables come first: JAX_COMPILATION_CACHE_DIR names another folder, or a bucket, and
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. A run of several processes needs the former: only its first process
    writes programs, so the folder must be one that all of them read. Call this after `jax.distributed` is initialized.
    """
    config: Any = jax.config
    chosen = config.jax_compilation_cache_dir is not None or config.jax_compilation_cache_max_size != -1
    if chosen or not config.jax_enable_compilation_cache or jax.process_count() > 1:
        return
    try:
        folder = own_folder(cache_folder() / "compiled")
        trim(folder)
    except (OSError, UserError) as error:
        reason = str(error) if isinstance(error, UserError) else f"{error.filename}: {error.strerror}"
        print(f"compiled programs are not kept ({reason.rstrip('.')})", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def own_folder(parent: Path) -> Path:
    """A folder below `parent` for this user and this kind of CPU; made if it is missing.

    The programs in it are run, so no other user may write there.

    Raises:
        UserError: it belongs to another user, or others may write to it.
        OSError: it cannot be made.
    """
    folder = parent / f"{os.getuid()}-{cpu_kind()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise UserError(f"other users may write to {folder}; run chmod 700 on it, or move it away.")
    with contextlib.closing(os.scandir(folder)):  # raises where it cannot be read
        return folder


def cpu_kind() -> str:
    """A short name for CPUs that run the same machine code: "x86_64-1c2f6a30"."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = platform.processor()
    about = re.findall(r"^(?:model name|flags|Features|CPU implementer|CPU part)\s*:.*$", text, re.MULTILINE) or [text]
    digest = hashlib.sha256("\n".join(sorted(set(about))).encode()).hexdigest()
    return f"{platform.machine() or 'cpu'}-{digest[:8]}"


def trim(folder: Path, most: int = MAX_BYTES) -> None:
    """Deletes damaged programs, then the least recently used ones until `most` bytes are left. Safe while others use the folder.

    A killed process or a full disk leaves a part of a file, which JAX would report at each use and never replace. Each file is
    checked once. JAX's own bound (jax_compilation_cache_max_size) is no choice: after a process that was killed between the two
    files of an entry, nobody can write any more.
    """
    stamp = folder / "checked"
    checked = stamp.stat().st_mtime if stamp.exists() else 0.0
    now, entries = time.time(), []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):
            about = path.stat()
            if about.st_mtime >= checked and not _complete(path.read_bytes()):
                path.unlink()
            else:
                entries.append((max(about.st_atime, about.st_mtime), about.st_size, path))
    if folder.exists():
        stamp.touch()
        os.utime(stamp, (now, now))
    left = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if left <= most:
            break
        path.unlink(missing_ok=True)
        left -= size


def _complete(content: bytes) -> bool:
    """Whether JAX can decompress an entry: with zstandard if that is installed, else with zlib."""
    try:
        if content.startswith(b"\x28\xb5\x2f\xfd"):
            import zstandard

            zstandard.ZstdDecompressor().decompress(content)
        else:
            zlib.decompress(content)
    except ImportError:
        return True
    except Exception:  # zstandard's own error, which derives from nothing else
        return False
    return True
