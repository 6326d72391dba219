"""What surrounds the code: the wheel, the workflows, templates, hooks, the citation and the changelog."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from epo_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_an_installation_has_every_file_that_is_not_a_module():
    """setuptools copies modules by itself, and other files only if a pattern of package-data names them."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    others = [file for file in (ROOT / "epo_jax").rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")]
    assert {file.name for file in others} >= {"py.typed", "report.html"}
    for file in others:
        named = [
            pattern for package, globs in patterns.items() for pattern in globs
            if fnmatch(str(file), str(ROOT / package.replace(".", "/") / pattern))
        ]  # fmt: skip
        assert named, f"{file} is in no pattern of package-data"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that pip builds, without network. The build writes next to the sources, so they are copied."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("the wheel is built by setuptools 77 or newer")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", *required_files()):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for name in ("epo_jax", "configs"):  # with the link from the first to the second
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist", source)
    [path] = (source / "dist").glob("*.whl")
    return path


def required_files():
    """The files that list dependencies, by themselves or in an extra."""
    dynamic = PROJECT["tool"]["setuptools"]["dynamic"]
    tables = [dynamic["dependencies"], *dynamic["optional-dependencies"].values()]
    return [name for table in tables for name in table["file"]]


def pip(command, *arguments, python=sys.executable):
    line = [sys.executable, "-m", "pip", "--python", python, command, "--no-deps", "--no-index", *arguments]
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of the commands of an environment in which the wheel was installed; dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip("install", wheel, python=folder / "bin" / "python")
    return folder / "bin"


def test_the_wheel_has_the_package_its_configs_and_one_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        contained = set(archive.namelist())
        [about] = {name.partition("/")[0] for name in contained if name.endswith("/METADATA")}
        entry_points, metadata = (archive.read(f"{about}/{name}").decode() for name in ("entry_points.txt", "METADATA"))
    files = [Path(folder) / name for folder, _, names in os.walk(ROOT / "epo_jax", followlinks=True) for name in names]
    ours = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"}
    assert ours <= contained and "epo_jax/configs/alfworld.py" in ours
    assert {name.partition("/")[0] for name in contained} == {"epo_jax", f"epo_jax-{PROJECT['project']['version']}.dist-info"}
    assert set(re.findall(r"^Provides-Extra: (\w+)$", metadata, re.M)) == {"cuda", "docs", "test", "tpu"}
    assert re.search(r"^Requires-Dist: jax\[cuda12\].*extra == .cuda.$", metadata, re.M)
    assert entry_points.split() == ["[console_scripts]", "epo-jax", "=", "epo_jax.__main__:main"]


def test_the_installed_command_works_from_any_folder(installed, tmp_path):
    def run(*arguments):
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run([installed / "epo-jax", *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True,
                              timeout=300)  # fmt: skip

    listed = run("--help")
    assert listed.returncode == 0 and all(f"epo-jax {name} " in listed.stdout for name in COMMANDS), listed.stderr
    helped = run("train", "--config=alfworld:laptop", "--help")
    assert helped.returncode == 0 and "env.train_games=1500" in helped.stdout, helped.stderr
    wrong = run("trian")
    assert wrong.returncode == 2 and "(nearest: 'train')" in wrong.stderr and wrong.stderr.count("\n") == 1
    refused = run("train", "--config=configs/alfworld.py:smoke", "--workdir=run", "--config.epo.lam=-1")
    assert refused.returncode == 2 and "config.epo.lam=-1.0 must be zero or positive" in refused.stderr
    assert not list(tmp_path.iterdir())
    (tmp_path / "own.py").write_text("def list_tasks(split, options):\n    return []\n")
    assert "the module has no function 'make_env'" in run("play", "--env=own").stderr, "modules of the current folder are found"


def test_every_program_is_a_command():
    programs = {f"epo_jax.{path.stem}" for path in (ROOT / "epo_jax").glob("*.py")}
    programs -= {"epo_jax.__init__", "epo_jax.__main__", "epo_jax.command"}
    assert {module for module, _ in COMMANDS.values()} == programs | {"epo_jax.envs.play"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_dispatched(name):
    module, about = COMMANDS[name]
    assert callable(importlib.import_module(module).main) and about


def test_the_workflow_runs_the_script_on_every_python_that_the_package_takes():
    job = jobs("ci")["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    low, high = (int(n) for n in re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["project"]["requires-python"]).groups())
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(low, high)]


def jobs(workflow):
    return yaml.safe_load((ROOT / f".github/workflows/{workflow}.yml").read_text())["jobs"]


@pytest.mark.parametrize("workflow", [path.stem for path in (ROOT / ".github/workflows").glob("*.yml")])
def test_workflows_use_released_actions(workflow):
    steps = [step for job in jobs(workflow).values() for step in job["steps"]]
    assert steps and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)


def test_the_workflow_builds_the_wheel_and_runs_its_command():
    [build, install] = (step["run"] for step in jobs("ci")["wheel"]["steps"] if "run" in step)
    assert "pip wheel" in build and "dist/epo_jax-" in install and "epo-jax" in install


@pytest.mark.parametrize("name", ["bug", "feature", "question"])
def test_issue_templates_are_forms(name):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = [item for item in form["body"] if item["type"] != "markdown"]
    assert fields and len({item["id"] for item in fields}) == len(fields) and all(item["attributes"]["label"] for item in fields)


def test_hooks_run_the_linter_of_the_environment():
    hooks = [hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repo["hooks"]]
    assert hooks and all(hook["entry"].startswith(".venv/bin/ruff ") and hook["language"] == "system" for hook in hooks)


def test_citation_and_changelog_name_the_version_of_the_package():
    version = PROJECT["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version and citation["license"] == PROJECT["project"]["license"]
    assert "2509.22576" in citation["references"][0]["url"]
    headings = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert version in headings[:2] and set(headings[:2]) - {version} <= {"Unreleased", "0.1.0"}


def test_moved_modules_of_the_changelog_are_where_it_says():
    moved = re.findall(r"^\| `(epo_jax[\w.]+)`[^|]* \| `(epo_jax[a-z_.]+)` \|", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert len(moved) > 20
    for old, new in moved:
        path = ROOT / new.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{old} -> {new}"


def headings(page):
    """The anchors that GitHub gives to the headings of a page."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_local_links_of_the_documents_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert len(pages) > 10
    for page in pages:
        for path, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
            if not path.startswith(("http:", "https:", "mailto:")):
                target = page.parent / path if path else page
                assert target.exists(), f"{page.relative_to(ROOT)}: {path}"
                assert not anchor or anchor in headings(target), f"{page.relative_to(ROOT)}: {path}#{anchor}"
