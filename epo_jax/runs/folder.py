"""The run folder and its contract: config.json, what a resumed run may change, and the record of changes."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from epo_jax.common.errors import UserError, explain
from epo_jax.common.files import append, write_atomically
from epo_jax.runs import lock, versions
from epo_jax.settings.config import base_config, flatten
from epo_jax.settings.sweep import sweep_section
from epo_jax.settings.table import SETTINGS
from epo_jax.settings.validate import validate

# How a resumed run treats each key (`Setting.resume`); the keys of an environment of one's own are fixed.
_ON_RESUME = {setting.key: setting.resume for setting in SETTINGS}

# Keys that each process of a run may have differently: they alter where and how often things happen, never what is learned.
# (Another mesh adds the same numbers in another order.)
RESUME_MAY_CHANGE = tuple(key for key, treatment in _ON_RESUME.items() if treatment == "free")


# {key: (the run's value, the new one)}
Changes = dict[str, tuple[Any, Any]]


class Command(NamedTuple):
    """A parsed command line.

    `flags` holds what the program itself defined, `changes` what a resumed run changes for good, `arguments` the options as
    they were given.
    """

    config: ConfigDict
    workdir: Path
    resume: bool
    flags: flags.FlagValues
    changes: Changes = {}  # noqa: RUF012  never written to
    arguments: tuple[str, ...] = ()


# What a new run would overwrite.
OF_A_RUN = ("checkpoints", "metrics.jsonl", "eval.jsonl", "trajectories.jsonl", "sweep.json", "members")


def check_workdir(workdir: Path, resume: bool) -> None:
    """Raises UserError unless a run can be started (or resumed) in `workdir`; writes nothing."""
    lock.refuse(workdir)
    if (workdir / "config.json").exists() != resume:
        if resume:
            raise UserError(f"--resume: {workdir} holds no run (no config.json); leave --resume out to begin one.")
        raise UserError(f"{workdir} already holds a run; add --resume to continue it or choose another --workdir.")
    left = [name for name in OF_A_RUN if not resume and (workdir / name).exists()]
    if left:
        raise UserError(
            f"--workdir={workdir} holds {left[0]} of a run whose config.json is missing; put that back, or choose another folder."
        )
    existing = workdir.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--workdir={workdir} cannot be a folder, as {existing} is a file; choose another.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir} cannot be written: no permission in {existing}; choose another.")


def open_workdir(command: Command) -> None:
    """Makes the run folder and writes its config.json, unless it is resumed.

    Raises:
      UserError: the file system refuses.
    """
    try:
        command.workdir.mkdir(parents=True, exist_ok=True)
        if not command.resume:
            write_config(command.config, command.workdir)
    except OSError as error:
        raise UserError(f"--workdir={command.workdir} cannot be written ({error.strerror}); choose another.") from None


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Writes `workdir`/config.json: the version of the format and every key, with overrides applied."""
    content = {"version": versions.VERSION, **config.to_dict()}
    write_atomically(Path(workdir) / "config.json", json.dumps(content, indent=2) + "\n")


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run in `workdir`, locked and validated; one of an earlier version as this version would have written it.

    Raises:
      UserError: the file is missing, is not JSON, was written by a later version, or has other keys or types than its version.
    """
    path = Path(workdir) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sweep = content.pop("sweep", None)
        saved, notes = saved_keys(content)
        config = base_config(saved["env.name"], **_env_options(saved)).lock()
    except FileNotFoundError:
        raise UserError(f"{path} is missing, so {workdir} is not a run folder.") from None
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        what = explain(error, "restore it or begin a new run")
        raise UserError(f"{path} cannot be read as the config of a run {what}.") from None
    for sentence in notes:
        print(f"{path}: {sentence}", file=sys.stderr)
    for key, value in saved.items():
        section, _, leaf = key.rpartition(".")
        try:
            (config[section] if section else config)[leaf] = tuples(value)
        except TypeError:
            raise UserError(f"{path}: {key}={value!r} has the wrong type; restore it or begin a new run.") from None
    if sweep is not None:
        with config.unlocked():
            config.sweep = sweep_section()  # with the coefficients that its version did not have
        try:
            config.sweep.update(tuples(sweep))
        except (TypeError, ValueError, KeyError, AttributeError):
            raise UserError(f"{path}: the section sweep has the wrong keys or types; restore it or begin a new run.") from None
    validate(config)
    return config


def saved_keys(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The keys of a config.json (without sweep) as this version has them, by dotted name, and notes for the user.

    Raises:
      UserError: the rest of a sentence about the file.
    """
    version = content.get("version", 1)
    if not isinstance(version, int) or not 1 <= version <= versions.VERSION:
        raise UserError(f"has version {version!r} of the format, and this installation reads 1 to {versions.VERSION}; update it.")
    saved, notes = versions.upgrade(flatten(content), version)
    known = flatten(base_config(saved["env.name"], **_env_options(saved)))
    for key in sorted(known.keys() - saved.keys()):
        raise UserError(f"lacks config.{key}; restore it or begin a new run.")
    for key in sorted(saved.keys() - known.keys()):
        raise UserError(f"has config.{key}, which is not a key; restore it or begin a new run.")
    return saved, notes


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples that a config has."""
    if isinstance(value, Mapping):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def _env_options(saved: dict[str, Any]) -> dict[str, Any]:
    """The keys of the section env besides its name."""
    env = {key.removeprefix("env."): value for key, value in saved.items() if key.startswith("env.")}
    return {key: tuples(value) for key, value in env.items() if key != "name"}


def refuse_other_program(config: ConfigDict, sweep: bool, what: str = "--config") -> None:
    """Raises UserError for the config of a sweep in `epo_jax.main`, and for one without a sweep in `epo_jax.sweep`."""
    if sweep and "sweep" not in config:
        raise UserError(
            f"{what} has no section sweep, so it is for epo-jax train; for a sweep take ablation, or add "
            "epo_jax.settings.sweep.sweep_section()."
        )
    if not sweep and "sweep" in config:
        raise UserError(f"{what} has a section sweep, so it is for epo-jax sweep; take a config without one for a run.")


def changes_of(config: ConfigDict, saved: ConfigDict, overridden: set[str], workdir: Path) -> Changes:
    """The recorded settings that differ between `config` and the `saved` one of the run.

    Raises:
      UserError: a fixed setting differs, or the command line does not name a recorded one, so that it differs by accident.
    """
    now, then = flatten(config), flatten(saved)
    changes = {}
    for key in sorted(now.keys() | then.keys()):
        treatment = _ON_RESUME.get(key, "fixed")
        if treatment == "free" or now.get(key) == then.get(key):
            continue
        differs = f"--resume: config.{key}={now.get(key)!r} differs from the run's {then.get(key)!r}"
        if key == "train.steps" and now[key] > then[key]:
            raise UserError(f"{differs}, for which its schedules were made; {train_longer(workdir, now[key])}.")
        if treatment == "fixed":
            raise UserError(
                f"{differs}, which it keeps, as its shapes or what it has saved depend on it; leave it out (and --config), or "
                f"begin a new run with --config.init_from.run={workdir}."
            )
        if key not in overridden:
            raise UserError(f"{differs}; leave --config out, or to change it for good name it on the command line.")
        changes[key] = then[key], now[key]
    return changes


def train_longer(workdir: Path, steps: int) -> str:
    """The rest of a sentence: how a run is trained for `steps` RL steps, more than it was begun with."""
    return (
        f"to train longer, begin a new run that goes on from it: epo-jax train {workdir}-longer --config={workdir} "
        f"--config.init_from.run={workdir} --config.init_from.state=everything --config.train.steps={steps}"
    )


def record_changes(changes: Changes, workdir: Path, step: int) -> None:
    """Appends {step, key, old, new} to `workdir`/changes.jsonl, and updates its config.json; `step` is the first with them."""
    if not changes:
        return
    config, rows = read_config(workdir), ""
    for key, (old, new) in changes.items():
        rows += json.dumps({"step": step, "key": key, "old": old, "new": new}) + "\n"
        config.update_from_flattened_dict({key: new})
        print(f"config.{key}={new!r} in place of {old!r} from RL step {step} on")
    append(workdir / "changes.jsonl", rows)
    write_config(config, workdir)
