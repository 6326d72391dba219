"""What the objectives take from the settings: coefficients (`Hyper`) and choices (`Choices`), made from the table."""

import collections
import dataclasses
from typing import TYPE_CHECKING, Any

from epo_jax.settings.table import SETTINGS

_TRACED = {setting.traced: setting.default_for("alfworld") for setting in SETTINGS if setting.traced}
_STATIC = {setting.static: setting.default_for("alfworld") for setting in SETTINGS if setting.static}

if TYPE_CHECKING:  # a type checker cannot derive fields from the table

    class Hyper(tuple):
        _fields: tuple[str, ...]

        def __new__(cls, **values: Any) -> "Hyper": ...
        def __getattr__(self, name: str) -> Any: ...
else:
    Hyper = collections.namedtuple("Hyper", _TRACED, defaults=_TRACED.values())

Hyper.__doc__ = """Coefficients: a pytree of traced scalars, so that one compiled program serves all their values.

A field for every setting with `traced`. `Hyper()` has the defaults of `base_config()`, which are the paper's on ALFWorld."""

Choices = dataclasses.make_dataclass(
    "Choices", [(name, type(default), default) for name, default in _STATIC.items()], frozen=True
)
Choices.__module__ = __name__
Choices.__doc__ = """Choices: what selects the program of the objective.

A field for every setting with `static`. `Choices()` has the defaults of `base_config()`, which are the paper's on ALFWorld."""
