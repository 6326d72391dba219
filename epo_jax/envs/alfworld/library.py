"""fast-downward's successor generator through ctypes: one private copy of the library for each loaded game.

`fast_downward` installs the library, and TextWorld uses it. Its task and its registry of visited states are global variables, so
every game needs its own copy; freed copies are reused.
"""

import ctypes
import functools
import os
import struct
import tempfile
from pathlib import Path

from epo_jax.common.errors import UserError

Proposition = tuple[str, tuple[str, ...]]  # predicate, arguments

_FREE: list[ctypes.CDLL] = []


class Operator(ctypes.Structure):
    """Mirrors the library's C struct."""

    _fields_ = [("id", ctypes.c_int), ("raw", ctypes.c_char * 1024), ("nb_effect_atoms", ctypes.c_int)]

    @property
    def name(self) -> str:
        return self.raw.decode("cp1252")


class Atom(ctypes.Structure):
    """Mirrors the library's C struct."""

    _fields_ = [("raw", ctypes.c_char * 1024)]

    @property
    def proposition(self) -> Proposition:
        """`Atom opened(fridge)` -> ("opened", ("fridge",)); a NegatedAtom's name gets TextWorld's prefix `not_`."""
        kind, rest = self.raw.decode("cp1252").split(" ", 1)
        name, arguments = rest.rstrip(")").split("(", 1)
        return ("not_" if kind == "NegatedAtom" else "") + name, tuple(a for a in arguments.split(", ") if a)


def borrow() -> ctypes.CDLL:
    """Returns a copy of the library that is not in use; `give_back` frees it."""
    if _FREE:
        return _FREE.pop()
    with tempfile.TemporaryDirectory(prefix="epo_jax-") as folder:
        path = os.path.join(folder, "libdownward.so")
        with open(path, "wb") as file:
            file.write(_image())
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise UserError(f"cannot load a library from {folder} ({error}); set TMPDIR to another folder.") from None
    library.load_sas.argtypes, library.load_sas.restype = [ctypes.c_char_p], None
    library.get_applicable_operators.argtypes = [ctypes.POINTER(Operator)]
    library.get_applicable_operators.restype = None
    library.get_state.argtypes, library.get_state.restype = [ctypes.POINTER(Atom)], None
    library.apply_operator.argtypes = [ctypes.c_int, ctypes.POINTER(Atom)]
    library.set_state_id.argtypes, library.set_state_id.restype = [ctypes.c_int], None
    library.check_goal.restype = ctypes.c_bool
    return library


def give_back(library: ctypes.CDLL) -> None:
    _FREE.append(library)


@functools.cache
def _image() -> bytes:
    """Returns the loadable part of libdownward.so: 1 of its 34 MB; the rest is debugging information."""
    import fast_downward.interface

    content = Path(fast_downward.interface.DOWNWARD_LIB_PATH).read_bytes()
    if content[:6] != b"\x7fELF\x02\x01":  # not a 64-bit little-endian ELF file: use all of it
        return content
    (table,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    ends = []
    for header in range(table, table + size * count, size):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", content, header)
        ends.append(offset + length if kind == 1 else 0)  # 1 is PT_LOAD
    return content[: max(ends)]
