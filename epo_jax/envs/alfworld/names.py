"""Names of objects in the texts: `fridge_bar__minus_01_dot_00...` is "fridge 1"."""

from collections import Counter
from collections.abc import Iterable, Mapping

_SIGNS = {"_bar_": "|", "_minus_": "-", "_plus_": "+", "_dot_": ".", "_comma_": ","}


def escape(text: str) -> str:
    """Spells an identifier with the characters that PDDL allows."""
    for word, sign in _SIGNS.items():
        text = text.replace(sign, word)
    return text


def display_names(identifiers: Iterable[str]) -> dict[str, str]:
    """Returns escaped id -> name; ids of one type are numbered from the last one down, as in ALFWorld.

    What has no place, such as a type, keeps its id, with ALFWorld's blank after it.
    """
    ids = sorted(identifiers)
    kinds = {i: i.split("_bar_")[0] + ("basin" if "basin" in i else "") for i in ids if "_bar_" in i}
    left = Counter(kinds.values())
    names = {}
    for i in ids:
        if i in kinds:
            names[i] = f"{kinds[i]} {left[kinds[i]]}"
            left[kinds[i]] -= 1
        else:
            names[i] = f"{_unescape(i)} "
    return names


def entities(types: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Returns object id -> the fields that a grammar may use, for objects of these types."""
    names = display_names(types)
    return {
        key: {"id": key, "name": names[key], "type": kind, "definite": "the", "indefinite": "a"} for key, kind in types.items()
    }


def _unescape(text: str) -> str:
    for word, sign in _SIGNS.items():
        text = text.replace(word, sign)
    return text
