"""The command line that train, evaluate and sweep share.

    --config=FILE.py[:preset]   what to run; `--config.section.key=value` overrides one key
    --workdir=FOLDER            the run folder
    --resume                    continue the run in it; without --config, overrides are changes of the run's own config

A program is written as

    def main(argv: list[str]) -> None:
        command = parse(argv)      # refuses everything that can be refused before anything is loaded or written
        ...
        open_workdir(command)      # makes the folder and writes config.json
        ...

    if __name__ == "__main__":
        sys.exit(run(main))
"""

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from epo_jax.common import stopping
from epo_jax.common.errors import Stopped, UserError, full_disk
from epo_jax.common.files import expand_user, write_atomically
from epo_jax.runs.folder import Command, _changes, check_workdir, read_config, refuse_other_program
from epo_jax.settings.config import ENVIRONMENTS, base_config, flatten
from epo_jax.settings.setting import Rule
from epo_jax.settings.validate import validate


def run(main: Callable[[list[str]], None]) -> int:
    """Calls `main(sys.argv)`; the exit code, with a sentence on stderr unless it is 0.

    2 after bad input or where a file system is full; 75 where the command was asked to stop, and is to be resumed or repeated;
    141, without a word, where a command that has nothing to save lost the reader of its output.
    """
    with stopping.listening() as listener:
        console, code, told, full = sys.stdout, 0, "", False
        sys.stdout = console and stopping.Output(console, listener)
        try:
            try:
                main(sys.argv)
            finally:
                print(end="", flush=True)
        except UserError as error:
            code, told = 2, f"error: {error}"
        except Stopped as stopped:
            code, told = stopping.CODE, str(stopped)
        except KeyboardInterrupt:
            unread = listener.output_closed and listener.sentence is None
            code, told = (stopping.CLOSED_OUTPUT, "") if unread else (stopping.CODE, listener.last_line())
        except Exception as error:
            if (sentence := full_disk(error)) is None:
                raise
            code, told, full = 2, f"error: {sentence}", True  # what threads have begun to write cannot be finished
        finally:
            sys.stdout = console
        if told:
            with contextlib.suppress(OSError):
                print(told, file=sys.stderr, flush=True)
        if listener.asked or full:
            stopping.end_at_once(code)
        return code


class ArgumentParser(argparse.ArgumentParser):
    """For programs without a config: what it refuses is told as everything else is, and `~` is a home folder in its paths."""

    PATHS = "checkpoint", "out", "to", "workdir"

    def parse_known_args(self, args=None, namespace=None):
        options, rest = super().parse_known_args(args, namespace)
        for name in self.PATHS:
            if str(given := getattr(options, name, None)).startswith("~"):
                setattr(options, name, type(given)(expand_user(given, f"--{name}")))
        return options, rest

    def error(self, message: str):
        raise UserError(f"{message}.")


def number_type(kind: type[int] | type[float], rule: Rule) -> Callable[[str], int | float]:
    """A type for `add_argument`: a number that a rule holds for."""
    words = f"a whole number, {rule.words}" if kind is int and "whole number" not in rule.words else rule.words

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be {words}") from None
        if not rule.holds(value):
            raise argparse.ArgumentTypeError(f"{text} must be {words}")
        return value

    return read


def add_base_option(parser: argparse.ArgumentParser) -> None:
    """The option that names the base model of a run's adapters, `base`."""
    about = "the model that a run's adapters were trained on, if it is no longer where it was"
    parser.add_argument("--config.model.path", dest="base", help=about)


def check_output(out: Path, example: str) -> None:
    """Raises UserError unless the file of --out can lie where it says."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        what = "is a folder" if out.is_dir() else f"lies in {out.parent}, which is no folder"
        raise UserError(f"--out={out} {what}; name a file to write, for example --out={example}.")


def write_output(out: Path, text: str) -> None:
    """Writes the file of --out, whole or not at all. Raises UserError where the file system refuses."""
    try:
        write_atomically(out, text)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({error.strerror}); choose another file.") from None


def parse(argv: Sequence[str], define: Callable[[flags.FlagValues], None] | None = None, sweep: bool = False) -> Command:
    """Reads and checks a command line (with the program's name first).

    Args:
      argv: as sys.argv.
      sweep: whether the config must have a section sweep, or must not.
      define: adds the program's own flags to the FlagValues it is given.

    Raises:
      UserError: an unknown flag, preset or key, a value of the wrong type or out of range, an unusable folder.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "The run folder.", flag_values=values)
    flags.DEFINE_bool("resume", False, "Continue the run in --workdir.", flag_values=values)
    flags.DEFINE_bool("help", False, "Print this.", short_name="h", flag_values=values)
    if define is not None:
        define(values)
    _read_flags(argv, values, _own_config(argv))
    if not values.workdir:
        raise UserError("--workdir is missing; name the run folder, for example --workdir=runs/first.")
    if "://" in values.workdir:
        raise UserError(
            f"--workdir={values.workdir} must be a local folder, as rows are appended to its files; choose one, and keep the "
            f"checkpoints in the bucket with --config.checkpoint.folder={values.workdir}."
        )
    workdir = expand_user(values.workdir, "--workdir")
    check_workdir(workdir, values.resume)
    config, changes = values.config, {}
    if config is None:
        raise UserError("--config is missing; name a config file, for example --config=configs/alfworld.py:laptop.")
    refuse_other_program(config, sweep)
    absolute_paths(config)
    validate(config)
    if values.resume:
        saved = read_config(workdir)
        refuse_other_program(saved, sweep, f"--workdir={workdir}")
        absolute_paths(saved)
        overridden = {match[1] for argument in argv if (match := re.match(r"--?(?:no)?config\.([^=]*)", argument))}
        changes = _changes(config, saved, overridden, workdir)
    return Command(config, workdir, values.resume, values, changes)


def _own_config(argv: Sequence[str]) -> ConfigDict | None:
    """The config of the run that is resumed, where the command line has none."""
    resumes = any(re.fullmatch(r"--?resume(=(true|1|yes|y|t))?", argument, re.IGNORECASE) for argument in argv)
    workdir = _argument(argv, "workdir")
    if not resumes or not workdir or _argument(argv, "config") is not None or "://" in workdir:
        return None
    workdir = expand_user(workdir, "--workdir")
    check_workdir(workdir, resume=True)
    return read_config(workdir)


def absolute_paths(config: ConfigDict) -> None:
    """Makes the local paths of a config absolute, so that a run can be read from anywhere."""
    for key in ("model.path", "env.data_dir", "checkpoint.folder", "init_from.run"):
        section, _, leaf = key.partition(".")
        path = config[section].get(leaf, "")
        if path and "://" not in path:
            local = expand_user(path, f"config.{key}")
            if key != "model.path" or local.exists() or path.startswith("~"):  # else it is a name on the hub
                config[section][leaf] = os.path.abspath(local)


def parse_config(arguments: Sequence[str]) -> ConfigDict:
    """The config that `--config=FILE.py[:preset]` and overrides of its keys come to, for programs without a run folder.

    Raises:
      UserError: as `parse`.
    """
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Print this.", short_name="h", flag_values=values)
    _read_flags(["", *arguments], values)
    if values.config is None:
        raise UserError("--config is missing; name a config file, for example --config=configs/alfworld.py:laptop.")
    absolute_paths(values.config)
    validate(values.config)
    return values.config


def _read_flags(argv: Sequence[str], values: flags.FlagValues, own: ConfigDict | None = None) -> None:
    """Reads a command line into `values`, --config and its keys among them, which override those of `own` where it is given."""
    argv = list(argv)
    # For the flags' own types "None" is no number, and a text like any other.
    without = [match[1] for argument in argv if (match := re.fullmatch(r"--?config\.([^=]+)=None", argument))]
    argv = [argument for argument in argv if not re.fullmatch(r"--?config\.[^=]+=None", argument)]
    if own is None:
        config_flags.DEFINE_config_file(
            "config", None, "Config file and preset, as configs/alfworld.py:laptop.", flag_values=values, sys_argv=argv
        )
    source = _argument(argv, "config")
    if source is not None:
        _check_source(source)
    try:
        if own is not None:
            config_flags.DEFINE_config_dict("config", own, "The run's config.", flag_values=values, sys_argv=argv)
        rest = values(argv)[1:]
    except (KeyError, AttributeError, TypeError) as error:
        raise _unknown_key(error, argv, source, own) from None
    except flags.Error as error:
        if source is None and own is None and any(re.match(r"--?config\.", argument) for argument in argv):
            raise UserError("--config must be given when its keys are overridden.") from None
        raise UserError(_wrong_type(str(error), values) or _sentence(str(error))) from None
    if without:
        _set_none(values.config, without, source or "the run's config")
    if values.help:
        print(values.module_help("epo_jax.command") or values.get_help())
        raise SystemExit(0)
    if rest:
        raise UserError(f"{rest[0]!r} is not understood; options begin with -- and are written --name=value.")


_KINDS = {bool: "True or False", int: "a whole number", float: "a number"}


def _wrong_type(message: str, values: flags.FlagValues) -> str | None:
    """The sentence for a key's value of another type, from absl's message; None if it is about something else."""
    match = re.fullmatch(r"flag --config\.([\w.]+)=(.*?): .*", message, re.DOTALL)
    if match is None or values["config"].value is None:
        return None
    usual = flatten(values["config"].value).get(match[1])
    kind = _KINDS.get(type(usual))
    return kind and f"--config.{match[1]}={match[2]} must be {kind}, such as {usual!r}."


def _set_none(config: ConfigDict | None, keys: list[str], source: str | None) -> None:
    """Sets the keys that may be None. Raises UserError for the others."""
    if config is None:
        raise UserError("--config must be given when its keys are overridden.")
    known = flatten(config)
    may = known | (flatten(base_config(known["env.name"])) if known["env.name"] in ENVIRONMENTS else {})
    for key in keys:
        if key not in known:
            raise UserError(f"config.{key} is not a key of {source}{_suggestion(key, known)}")
        if may[key] is not None:
            raise UserError(f"--config.{key}=None: the key needs a value; leave the option out for {known[key]!r}.")
        config.update_from_flattened_dict({key: None})


def _argument(argv: Sequence[str], name: str) -> str | None:
    """The value of --NAME, if it is there."""
    for position, argument in enumerate(argv):
        if match := re.fullmatch(rf"--?{name}(?:=(.*))?", argument, re.DOTALL):
            return match[1] if match[1] is not None else next(iter(argv[position + 1 :]), None)
    return None


def _check_source(source: str) -> None:
    """ml_collections reports a missing file only at the first use of the config, and then at length."""
    path = Path(source.split(":", 1)[0])
    if not path.is_file():
        found = ", ".join(sorted(str(near) for near in path.parent.glob("*.py") if near.name != "__init__.py"))
        raise UserError(f"--config={source}: there is no file {path}" + (f"; there is {found}." if found else "."))


def _unknown_key(error: Exception, argv: Sequence[str], source: str | None, own: ConfigDict | None) -> UserError:
    """A sentence for an override of a key that the config does not have."""
    if source is None and own is None:
        return UserError("--config must be given when its keys are overridden.")
    if own is not None:
        source, known = "the run's config", flatten(own)
    else:
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=[])
        values(["", f"--config={source}"])
        known = flatten(values.config)
    for argument in argv:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            if match[1] not in known:
                return UserError(f"config.{match[1]} is not a key of {source}{_suggestion(match[1], known)}")
    return UserError(_sentence(str(error)))


def _suggestion(key: str, known: Iterable[str]) -> str:
    """The end of a sentence: the nearest key by spelling, else one of the same name in another section."""
    same_name = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_name if len(same_name) == 1 else difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return f"; did you mean config.{near[0]}?" if near else "."


def _sentence(text: str) -> str:
    """A library's message on one line."""
    text = " ".join(text.split()).replace(" ?", "?").rstrip(".")
    return text if text.endswith("?") else text + "."
