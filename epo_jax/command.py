"""The command line: parsing, exit codes, and what several programs' options share.

    FOLDER                      the run folder, which every command takes first; also --workdir=FOLDER, or --checkpoint=FOLDER
                                where it may be a model. A run without one gets a folder with the date below runs/
    --config=NAME[:preset]      what to run, a config's name or file, or a run folder, whose config is taken;
                                `--config.section.key=value` overrides one key
    --resume                    continue the run in FOLDER; without --config, overrides are changes of the run's own config

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
import datetime
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from epo_jax.common import stopping
from epo_jax.common.errors import Stopped, UserError, full_disk
from epo_jax.common.files import expand_user, write_atomically
from epo_jax.runs.folder import Command, changes_of, check_workdir, read_config, refuse_other_program
from epo_jax.settings.config import flatten
from epo_jax.settings.describe import help_text
from epo_jax.settings.flags import complete, read, take
from epo_jax.settings.setting import Rule
from epo_jax.settings.table import SECTIONS, SWEEP


def run(main: Callable[[list[str]], None]) -> int:
    """Calls `main(sys.argv)` and returns the exit code.

    0: success. 2: bad input, or a full file system. 75: the command was stopped on request and can be resumed or repeated. 141: a
    command that has nothing to save lost the reader of its output. Except for 0 and 141, stderr has a sentence.
    """
    with stopping.listening() as listener:
        console, code, message, full = sys.stdout, 0, "", False
        sys.stdout = console and stopping.Output(console, listener)
        try:
            try:
                main(sys.argv)
            finally:
                print(end="", flush=True)
        except UserError as error:
            code, message = 2, f"error: {error}"
        except Stopped as stopped:
            code, message = stopping.CODE, str(stopped)
        except KeyboardInterrupt:
            unread = listener.output_closed and listener.sentence is None
            code, message = (stopping.CLOSED_OUTPUT, "") if unread else (stopping.CODE, listener.last_line())
        except Exception as error:
            if (sentence := full_disk(error)) is None:
                raise
            code, message, full = 2, f"error: {sentence}", True  # what threads have begun to write cannot be finished
        finally:
            sys.stdout = console
        if message:
            with contextlib.suppress(OSError):
                print(message, file=sys.stderr, flush=True)
        if listener.asked or full:
            stopping.end_at_once(code)
        return code


class ArgumentParser(argparse.ArgumentParser):
    """For programs without a config: raises UserError for bad input, and reads `~` in paths as a home folder."""

    PATHS = "checkpoint", "out", "to", "workdir"

    def add_folder(self, option: str, about: str, required: bool = True) -> None:
        """Adds the folder that the command reads: its first argument, or the value of `option`."""
        self.folder, self.usage = option, f"{self.prog} FOLDER [options]"
        self.add_argument(f"--{option}", required=required, metavar="FOLDER", help=f"{about}; may come first, without --{option}")

    def parse_known_args(self, args=None, namespace=None):
        if getattr(self, "folder", None):
            args = folder_first(args, self.folder)
        options, rest = super().parse_known_args(args, namespace)
        for name in self.PATHS:
            if str(path := getattr(options, name, None)).startswith("~"):
                setattr(options, name, type(path)(expand_user(path, f"--{name}")))
        return options, rest

    def error(self, message: str):
        if message.startswith("the following arguments are required: --") and getattr(self, "folder", None):
            raise UserError(f"name a folder first, for example {self.prog} runs/first.")
        raise UserError(f"{message}.")


def folder_first(arguments: Sequence[str], option: str) -> list[str]:
    """The arguments with a folder in the first place as the value of `option`.

    Raises:
      UserError: there are both.
    """
    if not arguments or arguments[0].startswith("-"):
        return list(arguments)
    if any(re.match(rf"--?{option}(=|$)", argument) for argument in arguments):
        raise UserError(f"{arguments[0]!r} is not understood, as --{option} names the folder; leave one of them out.")
    return [f"--{option}={arguments[0]}", *arguments[1:]]


def number_type(kind: type[int] | type[float], rule: Rule) -> Callable[[str], int | float]:
    """A type for `add_argument`: a number that satisfies a rule."""
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
    """Adds --config.model.path, the base model of a run's adapters, as `base`."""
    about = "the model that the run's adapters were trained on, if its path has changed"
    parser.add_argument("--config.model.path", dest="base", help=about)


def check_output(out: Path, example: str) -> None:
    """Raises UserError if --out is a folder, or is in none."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        what = "is a folder" if out.is_dir() else f"lies in {out.parent}, which is no folder"
        raise UserError(f"--out={out} {what}; name a file to write, for example --out={example}.")


def write_output(out: Path, text: str) -> None:
    """Writes the file of --out, whole or not at all. Raises UserError if the file system refuses."""
    try:
        write_atomically(out, text)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({error.strerror}); choose another file.") from None


def parse(argv: Sequence[str], define: Callable[[flags.FlagValues], None] | None = None, sweep: bool = False) -> Command:
    """Reads and checks a command line (with the program's name first).

    Args:
      argv: as sys.argv.
      define: adds the program's own flags to the FlagValues that it is given.
      sweep: whether the config must have a section sweep, or must not.

    Raises:
      UserError: an unknown flag, preset or key, a value of the wrong type or out of range, an unusable folder.
    """
    given, argv = tuple(argv[1:]), [*argv[:1], *folder_first(argv[1:], "workdir")]
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir",
        None,
        "The run folder; may come first, without --workdir. Without one, the date is its name.",
        flag_values=values,
    )
    flags.DEFINE_bool("resume", False, "Continue the run in FOLDER.", flag_values=values)
    flags.DEFINE_bool("help", False, "List the options and the settings.", short_name="h", flag_values=values)
    if define is not None:
        define(values)
    own, argv = _own_config(argv)
    overridden = read(argv, values, own)
    if values.help:
        print(_help(argv[0], values, sweep))
        raise SystemExit(0)
    if not values.workdir:
        values.workdir = _dated_folder(argv, values, "sweeps" if sweep else "runs")
    if "://" in values.workdir:
        raise UserError(
            f"--workdir={values.workdir} must be a local folder, as rows are appended to its files; choose one, and keep the "
            f"checkpoints in the bucket with --config.checkpoint.folder={values.workdir}."
        )
    workdir = expand_user(values.workdir, "--workdir")
    check_workdir(workdir, values.resume)
    if values.config is not None:
        refuse_other_program(values.config, sweep)
    config, changes = complete(values.config), {}
    if values.resume:
        saved = read_config(workdir)
        refuse_other_program(saved, sweep, f"--workdir={workdir}")
        changes = changes_of(config, complete(saved), overridden, workdir)
    return Command(config, workdir, values.resume, values, changes, given)


def parse_config(arguments: Sequence[str]) -> ConfigDict:
    """The config of `--config=FILE.py[:preset]` with overrides of its keys, for programs without a run folder.

    Raises:
      UserError: as `parse`.
    """
    values = flags.FlagValues()
    own, arguments = _own_config(["", *arguments])
    read(arguments, values, own)
    return complete(values.config)


def _own_config(argv: Sequence[str]) -> tuple[ConfigDict | None, Sequence[str]]:
    """The config of a run folder, where the command line refers to one, and the arguments without this reference.

    It is the config of the run that is resumed, if the command line has no other, or that of --config=FOLDER.
    """
    source, others = take(argv, "config")
    if source is not None and (expand_user(source, "--config") / "config.json").is_file():
        return read_config(expand_user(source, "--config")), others
    resumes = any(re.fullmatch(r"--?resume(=(true|1|yes|y|t))?", argument, re.IGNORECASE) for argument in argv)
    workdir, _ = take(argv, "workdir")
    if not resumes or not workdir or source is not None or "://" in workdir:
        return None, argv
    folder = expand_user(workdir, "--workdir")
    check_workdir(folder, resume=True)
    return read_config(folder), argv


def _dated_folder(argv: Sequence[str], values: flags.FlagValues, parent: str) -> str:
    """The folder of a run that the command line does not name, printed: runs/alfworld-laptop-20261128-101500.

    Raises:
      UserError: the run is resumed, or has several processes, which must have the same folder.
    """
    if values.resume or ("coordinator" in values and values.coordinator):
        why = "--resume" if values.resume else "--coordinator"
        raise UserError(f"{why}: name the run folder first, for example epo-jax train runs/first {why}.")
    name, _, preset = (take(argv, "config")[0] or "").partition(":")
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = f"{parent}/" + "-".join(filter(None, [Path(name).stem, preset, now]))
    if not ("dry_run" in values and values.dry_run):
        print(f"run folder: {folder}", flush=True)
    return folder


def _help(program: str, values: flags.FlagValues, sweep: bool) -> str:
    """The options of a program, and the settings: the defaults, or those of --config."""
    options = [values[name] for name in sorted(values) if "." not in name and len(name) > 1]
    lines = [f"  --{option.name}{'' if option.boolean else '=...'}\n      {option.help}" for option in options]
    sections = (*SECTIONS, SWEEP) if sweep else SECTIONS
    usage = f"usage: {program} [FOLDER] --config=NAME[:preset] [options]"
    return "\n".join([usage, "", "Options", *lines, "", help_text(sections, flatten(values.config or {}))])
