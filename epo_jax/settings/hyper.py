"""What the objectives take from the settings: coefficients (`Hyper`) and choices (`Choices`), made from the table."""

import collections
import dataclasses
from typing import Any, cast

from epo_jax.settings.table import SETTINGS

_TRACED = {setting.traced: setting.default_for("alfworld") for setting in SETTINGS if setting.traced}
_STATIC = {setting.static: setting.default_for("alfworld") for setting in SETTINGS if setting.static}

# Any: a type checker cannot derive fields from the table.
_Coefficients: Any = cast(Any, collections.namedtuple("_Coefficients", _TRACED, defaults=_TRACED.values()))
_Choices: Any = dataclasses.make_dataclass("_Choices", [(k, type(v), v) for k, v in _STATIC.items()], frozen=True)


class Hyper(_Coefficients):
    """Coefficients: a pytree of traced scalars, so that one compiled program serves all their values.

    A field for every setting with `traced`. `Hyper()` has the defaults of `base_config()`, which are the paper's on ALFWorld.
    """

    __slots__ = ()


class Choices(_Choices):
    """Choices that select the program of the objective.

    A field for every setting with `static`. `Choices()` has the defaults of `base_config()`, which are the paper's on ALFWorld.
    """
