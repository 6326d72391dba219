"""A config from the command line: --config=NAME[:preset], and --config.section.key=value for single keys.

NAME is a config file of your own, or one of those in `configs/`, such as `alfworld`, which an installation has as well.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from epo_jax.common.errors import UserError, nearest
from epo_jax.common.files import expand_user
from epo_jax.settings.config import flatten
from epo_jax.settings.table import SETTINGS
from epo_jax.settings.validate import validate

_ABOUT = "Config and preset, for example alfworld:laptop or my_config.py:large; --config.KEY=VALUE overrides a key."
_PRESETS = Path(__file__).parents[1] / "configs"
_OPTIONAL = {setting.key for setting in SETTINGS if setting.default is None}
_KINDS = {bool: "True or False", int: "a whole number", float: "a number"}


def read(argv: Sequence[str], values: flags.FlagValues, own: ConfigDict | None = None) -> set[str]:
    """Parses a command line into `values`, the config among them.

    Args:
      argv: as sys.argv.
      values: the flags of the program. It gets `config`: the config with overrides, or None.
      own: the config that is overridden if there is no --config.

    Returns:
      The keys that the command line overrides.

    Raises:
      UserError: an unknown flag, file, preset or key, or a value of another type.
    """
    source, argv = take(argv, "config")
    config, name = (own, "the run's config") if source is None else (_load(source), source)
    known = {} if config is None else flatten(config)
    keys = {match[1] for argument in argv if (match := re.match(r"--?(?:no)?config\.([^=]*)", argument))}
    if keys and config is None:
        raise UserError("--config must be given when its keys are overridden.")
    for key in sorted(keys):
        if not any(each == key or each.startswith(f"{key}.") for each in known):
            raise UserError(f"config.{key} is not a key of {name}{_suggestion(key, known, 'config.')}")
    # The flags would read "None" as a text, or refuse it as a number.
    emptied = [match[1] for argument in argv if (match := re.fullmatch(r"--?config\.([^=]+)=None", argument))]
    argv = [argument for argument in argv if not re.fullmatch(r"--?config\.[^=]+=None", argument)]
    if config is None:
        flags.DEFINE_string("config", None, _ABOUT, flag_values=values)
    else:
        config_flags.DEFINE_config_dict("config", config, _ABOUT, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        option = error.flagname.partition("=")[0]
        near = nearest(option, [each for each in values if "." not in each])
        key = _suggestion(option, known or [setting.key for setting in SETTINGS], "--config.")
        raise UserError(f"--{option} is not an option{f'{near}.' if near else key}") from None
    except flags.Error as error:
        raise UserError(_wrong_type(str(error), known) or _sentence(str(error))) from None
    if rest:
        raise UserError(f"{rest[0]!r} is not understood; the run folder comes first, and options are written --name=value.")
    for key in emptied:
        if known[key] is not None and key not in _OPTIONAL:
            raise UserError(f"--config.{key}=None: the key needs a value; leave the option out for {known[key]!r}.")
        values.config.update_from_flattened_dict({key: None})
    return keys


def take(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The last value of --NAME=VALUE or --NAME VALUE, or None, and the other arguments."""
    value, others, arguments = None, [], iter(argv)
    for argument in arguments:
        match = re.fullmatch(rf"--?{name}(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            others.append(argument)
        else:
            value = next(arguments, None) if match[1] is None else match[1]
    return value, others


def complete(config: ConfigDict | None) -> ConfigDict:
    """The config with absolute paths, so that the run can be used from anywhere. Raises UserError if it is missing or invalid."""
    if config is None:
        raise UserError("--config is missing; name a config, for example --config=alfworld:laptop.")
    for key in ("model.path", "env.data_dir", "checkpoint.folder", "init_from.run"):
        section, _, leaf = key.partition(".")
        path = config[section].get(leaf, "")
        if path and "://" not in path:
            local = expand_user(path, f"config.{key}")
            if key != "model.path" or local.exists() or path.startswith("~"):  # else it is a name on the hub
                config[section][leaf] = os.path.abspath(local)
    validate(config)
    return config


def _load(source: str) -> ConfigDict:
    """The config of NAME[:preset]."""
    name, colon, preset = source.partition(":")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, _ABOUT, flag_values=values, sys_argv=[])
    values(["", f"--config={config_file(name)}{colon}{preset}"])
    return values.config


def config_file(name: str) -> Path:
    """The config file that `name` stands for.

    A file comes first. `alfworld`, `alfworld.py` and `configs/alfworld.py` are otherwise the one in `configs/`.

    Raises:
      UserError: there is neither.
    """
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path
    own = _PRESETS / f"{path.stem}.py"
    if path.stem != "__init__" and own.is_file() and (path.parent == Path() or path.parent.name == "configs"):
        return own
    known = sorted(each.stem for each in _PRESETS.glob("*.py") if each.stem != "__init__")
    near = nearest(path.stem, [*known, *(each.stem for each in path.parent.glob("*.py"))])
    raise UserError(
        f"--config={name}: there is no such file, and no config of that name{near}; choose one of {', '.join(known)}, or name "
        "a file that ends in .py."
    )


def _suggestion(key: str, known: Iterable[str], prefix: str) -> str:
    """The end of a sentence: the keys of the same name in other sections if there are few, or else the nearest by spelling."""
    same_name = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = same_name if len(same_name) == 1 or (same_name and not close) else close
    if not near:
        return "."
    *first, last = [f"{prefix}{each}" for each in near[:4]]
    return f"; did you mean {', '.join(first)}{' or ' * bool(first)}{last}?"


def _wrong_type(message: str, known: Mapping[str, Any]) -> str | None:
    """The sentence for a value of another type, from absl's message; None if that is about something else."""
    match = re.fullmatch(r"flag --config\.([\w.]+)=(.*?): .*", message, re.DOTALL)
    kind = match and _KINDS.get(type(known.get(match[1])))
    return f"--config.{match[1]}={match[2]} must be {kind}, such as {known[match[1]]!r}." if match and kind else None


def _sentence(text: str) -> str:
    """A library's message on one line."""
    text = " ".join(text.split()).replace(" ?", "?").rstrip(".")
    return text if text.endswith("?") else text + "."
