"""Writing a file so that a reader, or a crash, never meets half of it."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Puts `text` at `path` by writing beside it and renaming over it."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
