"""The documents name config keys, commands, files and code: they must exist, and docs/method.md may miss none of its own."""

import contextlib
import functools
import importlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import pytest

from epo_jax.__main__ import COMMANDS
from epo_jax.command import parse
from epo_jax.objectives import registry
from epo_jax.parallel import hosts
from epo_jax.runs import profiling
from epo_jax.settings.config import base_config, flatten
from epo_jax.settings.table import SETTINGS
from epo_jax.training import dry_run

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
TEXT = (ROOT / "docs" / "method.md").read_text()
NAMES = re.findall(r"`([a-z_]+\.[a-z_]+)(?:=[^`]*)?`", TEXT)
MODULES = ("advantages", "controls", "entropy", "head", "loss", "policy", "registry", "released_rows", "value")


def test_config_keys_exist():
    known = flatten(base_config()).keys() | flatten(base_config("scienceworld")).keys()
    sections = {key.partition(".")[0] for key in known}
    named = {name for name in NAMES if name.partition(".")[0] in sections}
    assert len(named) > 30 and named <= known, named - known


def test_functions_exist():
    named = [name.split(".") for name in NAMES if name.partition(".")[0] in MODULES and not name.endswith(".py")]
    assert len(named) > 15
    for module, function in named:
        assert hasattr(importlib.import_module(f"epo_jax.objectives.{module}"), function), f"{module}.{function}"


def test_every_coefficient_and_every_arm_is_explained():
    keys = {key for key in flatten(base_config()) if key.startswith(("epo.", "algo.", "control."))}
    mechanics = {"algo.epochs", "algo.mini_batches", "algo.micro_batch_rows"}
    assert keys - mechanics <= set(NAMES), keys - mechanics - set(NAMES)
    for arm in (*registry.BASES, *registry.VARIANTS):
        assert f"`{arm}`" in TEXT, arm


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_of_commands_exist(page):
    known = {setting.key for setting in SETTINGS}
    swept = {f"sweep.over.{setting.key}" for setting in SETTINGS if setting.traced}
    named = set(re.findall(r"--config\.([a-z_]+(?:\.[a-z_0-9]+)*)", page.read_text()))
    assert named <= known | swept | {"sweep.over"}, named - known - swept


@functools.cache
def help_of(command):
    """What `--help` of a command prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(COMMANDS[command][0]).main([f"epo-jax {command}", "--help"])
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_help_lists_the_options_of_documented_commands(page):
    for command, rest in re.findall(r"\bepo-jax ([a-z]+) ((?:\\\n|[^\n`])*)", page.read_text()):
        for option in re.findall(r"(?<=--)[a-z_]+(?![\w.])", rest):
            assert re.search(rf"--{option}\b", help_of(command)), f"epo-jax {command} --{option}"


def commands_of(page):
    """The indented commands that train, in one line each, without comments."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    return [re.sub(r"\s#.*", "", line).strip() for line in re.findall(r"^    (epo-jax (?:train|sweep) .*)$", text, re.M)]


def define_flags(values):
    for define in (hosts.define_flags, profiling.define_flag, dry_run.define_flag):
        define(values)


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.name)
def test_commands_that_train_can_be_pasted(page, tmp_path, monkeypatch):
    """Their configs, presets, keys and values are accepted. Commands about a run or a file that a reader makes are left out."""
    monkeypatch.chdir(tmp_path)
    for command in commands_of(page):
        _, program, *rest = shlex.split(command)
        if "--resume" not in rest and "..." not in rest and "--config=guess_config.py" not in rest:
            parse([program, *rest], define_flags, sweep=program == "sweep")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_files_of_commands_exist(page):
    text = page.read_text()
    for module in re.findall(r"python -m ((?:epo_jax|benchmarks)[a-z_.]*[a-z])", text):
        assert importlib.util.find_spec(module), module
    for command in re.findall(r"\bepo-jax ([a-z]+)", text):
        assert command in COMMANDS, command
    for path in re.findall(r"(?:python |`|\./)((?:benchmarks|configs|launch|epo_jax)/[\w/.-]*\w)", text):
        assert (ROOT / path).exists(), path
