"""The direction of imports: each package's docstring names the packages that it may import, and no other import is there.

A command (a module next to the packages, and `envs/play`) may import everything, and no module imports it; `command.py` is
shared by the commands.
"""

import ast
import graphlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import epo_jax

ROOT = Path(epo_jax.__file__).parent
COMMANDS = {*(path.stem for path in ROOT.glob("*.py")), "envs.play"} - {"__init__"}
SHARED_BY_COMMANDS = "command"


def modules() -> dict[str, Path]:
    """Every module, by its name below epo_jax: {"models.decoder": path}."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))} | {"": ROOT}


def packages() -> dict[str, set[str]]:
    """Every package, with those that its docstring allows it to import."""
    allowed = {}
    for path in sorted(ROOT.rglob("*/__init__.py")):
        name = ".".join(path.parent.relative_to(ROOT).parts)
        line = re.search(r"^May import: ([\w., ]+)\.$", ast.get_docstring(ast.parse(path.read_text())) or "", re.MULTILINE)
        assert line, f"{path}: the docstring has no line 'May import: PACKAGE, PACKAGE.'"
        allowed[name] = set(line[1].split(", ")) - {"nothing"}
    return allowed


def imports(source: str, known) -> list[tuple[int, str]]:
    """(line, module below epo_jax) of every import of this package, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the module's name in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *parts = name.split(".")
            if first == "epo_jax":
                while ".".join(parts) not in known:
                    parts.pop()  # a function or a class of the module
                found.append((node.lineno, ".".join(parts)))
    return found


def may_import(module: str, target: str, allowed: dict[str, set[str]]) -> bool:
    if target in COMMANDS:
        return target == SHARED_BY_COMMANDS and module in COMMANDS
    if module in COMMANDS or not target:
        return True
    here, there = package_of(module, allowed), package_of(target, allowed)
    if here.partition(".")[0] == there.partition(".")[0]:  # "envs" inside envs: its own modules, not its other packages
        return there == here or there in allowed[here]
    return there in allowed[here] or there.partition(".")[0] in allowed[here]


def package_of(module: str, known) -> str:
    return module if module in known else module.rpartition(".")[0]


def wrong(module: str, source: str) -> list[tuple[int, str]]:
    known, allowed = modules(), packages()
    known |= dict.fromkeys(allowed)
    return [(line, target) for line, target in imports(source, known) if not may_import(module, target, allowed)]


def test_no_import_points_the_wrong_way():
    found = []
    for module, path in modules().items():
        if path.name == "__init__.py" or path.is_dir():
            continue
        for line, target in wrong(module, path.read_text()):
            found.append(f"{path}:{line}: epo_jax.{module} may not import epo_jax.{target}")
    assert not found, "\n".join(found)


def test_what_is_no_command_takes_nothing_from_main_and_sweep_but_the_call():
    """Tests, benchmarks and config files import what they need from the packages."""
    found = []
    for path in (path for folder in ("tests", "benchmarks") for path in sorted((ROOT.parent / folder).rglob("*.py"))):
        found += [f"{path}:{line}: {name}" for line, name in taken_from_commands(path.read_text())]
    assert not found, "\n".join(found)
    source = "from epo_jax import main as m\nfrom epo_jax.sweep import train\nm.main([])\nm.evaluate\nsetattr(m, 'stuck', 1)"
    assert taken_from_commands(source) == [(2, "sweep.train"), (4, "main.evaluate")]


def taken_from_commands(source: str) -> list[tuple[int, str]]:
    """(line, name) of everything but `main` that a source takes from the modules epo_jax.main and epo_jax.sweep."""
    tree, aliases, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "epo_jax":
            aliases |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in ("main", "sweep")}
        elif isinstance(node, ast.ImportFrom) and node.module in ("epo_jax.main", "epo_jax.sweep"):
            found += [(node.lineno, f"{node.module[8:]}.{alias.name}") for alias in node.names if alias.name != "main"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            if node.attr != "main":
                found.append((node.lineno, f"{aliases[node.value.id]}.{node.attr}"))
    return sorted(found)


def test_packages_import_nothing():
    for name in packages():
        path = ROOT.joinpath(*name.split("."), "__init__.py")
        assert imports(path.read_text(), modules()) == [], f"{path}: importing a package must cost nothing"


def test_the_packages_have_an_order():
    allowed = packages()
    for name, others in allowed.items():
        assert others <= set(allowed), f"{name} may import {others - set(allowed)}, which are no packages"
    order = list(graphlib.TopologicalSorter(allowed).static_order())  # raises CycleError
    assert order.index("training") > order.index("rollout") > order.index("models") > order.index("common")


@pytest.mark.parametrize(
    ("module", "statement", "target"),
    [
        ("objectives.loss", "from epo_jax.models.decoder import Params", "models.decoder"),
        ("models.decoder", "from epo_jax.objectives import loss", "objectives.loss"),
        ("models.decoder", "import epo_jax.rollout.lane", "rollout.lane"),
        ("models.decoder", "def f():\n    from epo_jax.training.state import TrainState", "training.state"),
        ("training.step", "from epo_jax import main", "main"),
        ("training.step", "from epo_jax.command import run", "command"),
        ("main", "from epo_jax.evaluate import main", "evaluate"),
        ("runs.metrics", "from epo_jax.training.step import make_train_step", "training.step"),
        ("envs.agent", "from epo_jax.settings.config import base_config", "settings.config"),
        ("envs.base", "from epo_jax.envs.alfworld import protocol", "envs.alfworld.protocol"),
        ("envs.workers.pool", "from epo_jax.envs.alfworld import engine", "envs.alfworld.engine"),
        ("envs.scienceworld.jvm", "from epo_jax.envs.play import play", "envs.play"),
    ],
)
def test_what_is_wrong_is_found(module, statement, target):
    assert [each for _, each in wrong(module, statement)] == [target]


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("rollout.lane", "from epo_jax.envs.workers.pool import EnvPool\nfrom epo_jax.models import decoder\nimport jax"),
        ("envs.workers.pool", "from epo_jax.envs import base\nfrom epo_jax.envs.workers.process import Request"),
        ("envs.play", "from epo_jax.command import run\nfrom epo_jax.settings.config import base_config"),
        ("training.step", "from epo_jax import __version__"),
        ("main", "from epo_jax.command import run\nfrom epo_jax.training import step"),
    ],
)
def test_what_is_right_is_left_alone(module, statement):
    assert wrong(module, statement) == []


def test_environments_run_without_jax():
    """A worker process that imported JAX would take seconds and hundreds of megabytes more."""
    names = [each.name for each in pkgutil.walk_packages([str(ROOT / "envs")], "epo_jax.envs.")]
    assert {"epo_jax.envs.workers.worker", "epo_jax.envs.alfworld.jobs", "epo_jax.envs.play"} <= set(names)
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint('jax' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program, *names], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
