"""The quickstart script, with stand-ins for python and the compilers."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests import xla

ROOT = Path(__file__).parents[1]
PYTEST = "-m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder"
TOOLS = ("bash", "cat", "cksum", "date", "dirname", "env", "mkdir", "rm", "chmod", "ln")

# Plays python: answers the version and module questions as told, makes a venv of itself, records every other call.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *version_info*) exit ${WRONG_VERSION:-0} ;;
  *ensurepip*) exit ${NO_VENV:-0} ;;
  --version) echo Python 3.11.0 ;;
  "-m venv .venv") mkdir -p .venv/bin; ln -s "$0" .venv/bin/python; ln -s "$0" .venv/bin/ruff ;;
  *) echo "$*" >>calls; echo "$XLA_FLAGS" >flags; if [[ "$*" == *"$FAIL_ON"* && -n "$FAIL_ON" ]]; then exit 1; fi ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A clone whose PATH holds only what the test puts there."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "local", tmp_path / "launch" / "local")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in TOOLS:
        (programs / tool).symlink_to(shutil.which(tool))
    for name, text in {"python3.11": PYTHON, "cc": "", "c++": "", "make": ""}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return tmp_path


def launch(clone, *arguments, **variables):
    environment = {"PATH": str(clone / "bin"), **variables}
    return subprocess.run(
        [clone / "launch" / "local", *arguments], env=environment, cwd="/", capture_output=True, text=True, timeout=60
    )


def calls(clone):
    path = clone / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_test_installs_then_lints_then_checks_types_then_tests(clone):
    assert launch(clone, "test", "-k", "wilson").returncode == 0
    made = calls(clone)
    assert made[0].endswith("install --quiet --disable-pip-version-check uv")
    assert "-r requirements.txt" in made[1] and "--editable ." in made[2]
    assert made[3:6] == ["check .", "format --check .", "-m mypy"]
    assert made[6:] == [f"{PYTEST} -k wilson"]


def test_numerics_runs_tests_that_are_there_with_the_instructions_of_an_old_cpu(clone):
    """Flags that are set already come after, and so win."""
    assert launch(clone, "numerics", "-x", HOSTTYPE="x86_64", XLA_FLAGS="--xla_cpu_max_isa=AVX2").returncode == 0
    flags, command = (clone / "flags").read_text().strip(), calls(clone)[-1].split()
    assert flags == "--xla_cpu_max_isa=SSE4_2 --xla_cpu_use_fusion_emitters=true --xla_cpu_max_isa=AVX2"
    assert command[:6] == PYTEST.split() and command[-1] == "-x"
    assert len(command) > 10 and all((ROOT / path).exists() for path in command[6:-1])


def test_numerics_is_left_out_on_other_cpus(clone):
    result = launch(clone, "numerics", HOSTTYPE="aarch64")
    assert result.returncode == 0 and "this one is aarch64" in result.stdout and "-m pytest" not in " ".join(calls(clone))


def test_commands_that_tests_start_are_compiled_for_the_same_cpu(monkeypatch):
    """conftest.py has added to what it was given, which wins; a command takes what was given, and its own."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=SSE4_2 --xla_cpu_use_fusion_emitters=true")
    monkeypatch.setenv("XLA_FLAGS", xla.of_tests())
    assert os.environ["XLA_FLAGS"].split()[-2:] == ["--xla_cpu_max_isa=SSE4_2", "--xla_cpu_use_fusion_emitters=true"]
    assert set(xla.QUICK) < set(os.environ["XLA_FLAGS"].split())
    assert xla.of_command("--own") == "--xla_cpu_max_isa=SSE4_2 --xla_cpu_use_fusion_emitters=true --own"


@pytest.mark.parametrize("failing", ["numerics", "test", ""])
def test_the_job_runs_both_and_fails_with_either(clone, failing):
    (clone / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", clone / ".ci" / "run")
    (clone / "launch" / "local").write_text('#!/usr/bin/env bash\necho "$1" >>calls\n[[ "$1" != "$FAIL_ON" ]]\n')
    done = subprocess.run(
        [clone / ".ci" / "run"], env={"PATH": str(clone / "bin"), "FAIL_ON": failing}, capture_output=True, text=True, timeout=60
    )
    assert calls(clone) == ["numerics", "test"] and (done.returncode != 0) == bool(failing), done.stderr


def test_demo_installs_what_it_needs_and_no_compiler(clone):
    for name in ("cc", "c++", "make"):
        os.unlink(clone / "bin" / name)
    assert launch(clone, "demo").returncode == 0
    made = calls(clone)
    assert [line.partition("version-check ")[2] for line in made[:-1]] == [
        "uv", "-r requirements/core.txt", f"--no-deps {pinned('alfworld')}", "--no-deps --editable ."
    ]  # fmt: skip


def pinned(package):
    lines = (ROOT / "requirements" / "envs.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def test_the_full_list_has_what_the_package_and_its_tests_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    listed = {line[3:] for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("-r ")}
    assert listed == {*project["dependencies"]["file"], *project["optional-dependencies"]["test"]["file"]}


def test_an_installation_for_the_demo_is_completed_by_others_and_serves_as_one(clone):
    assert launch(clone, "demo").returncode == 0
    (clone / ".venv" / "mark").write_text("")
    assert launch(clone, "setup").returncode == 0
    assert "-r requirements.txt" in "".join(calls(clone)) and (clone / ".venv" / "mark").exists()
    made = len(calls(clone))
    assert launch(clone, "demo").returncode == 0
    assert len(calls(clone)) == made + 1


UV = """#!/usr/bin/env bash
echo "uv $*" >>calls
if [[ "$*" == *"$UV_FAILS_ON"* && -n "$UV_FAILS_ON" ]]; then exit 1; fi
"""


def test_uv_installs_if_it_is_there_and_pip_where_it_fails(clone):
    (clone / "bin" / "uv").write_text(UV)
    (clone / "bin" / "uv").chmod(0o755)
    assert launch(clone, "demo", UV_FAILS_ON="alfworld").returncode == 0
    *made, _ = calls(clone)
    into = "uv pip install --quiet --python .venv/bin/python"
    assert made == [
        f"{into} -r requirements/core.txt",
        f"{into} --no-deps {pinned('alfworld')}",
        f"-m pip install --quiet --disable-pip-version-check --no-deps {pinned('alfworld')}",
        f"{into} --no-deps --editable .",
    ]


@pytest.mark.parametrize(("options", "preset"), [([], "demo"), (["--full"], "laptop")])
def test_demo_trains_its_preset_and_tells_where(clone, options, preset):
    result = launch(clone, "demo", *options, "--config.epo.lam=0")
    assert result.returncode == 0, result.stderr
    command = calls(clone)[-1].split()
    assert command[:3] == ["-m", "epo_jax.main", f"--config=alfworld:{preset}"]
    assert command[3].startswith("--workdir=runs/demo-2") and command[4:] == ["--config.epo.lam=0"]
    assert f"Curves: {command[3].removeprefix('--workdir=')}/figures" in result.stdout
    assert ("--full" in result.stdout) == (preset == "demo")
    assert re.search(r"^Took 0:\d\d in all, of which 0:\d\d to set up", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("words", [["--workdir=runs/mine"], ["--workdir", "runs/mine"]])
def test_demo_tells_the_workdir_that_was_asked_for(clone, words):
    assert "Curves: runs/mine/" in launch(clone, "demo", *words, "--resume").stdout
    assert calls(clone)[-1].endswith("--workdir=runs/mine --resume")


def test_demo_refuses_a_workdir_without_a_name(clone):
    result = launch(clone, "demo", "--workdir")
    assert result.returncode == 2 and "--workdir needs a folder" in result.stderr


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], ["demo", "--help"]])
def test_help_lists_the_tasks_and_installs_nothing(clone, words):
    result = launch(clone, *words)
    assert result.returncode == 0 and not calls(clone)
    assert all(f"./launch/local {task}" in result.stdout for task in ("demo", "test", "numerics", "setup"))


def test_a_failed_demo_fails_and_claims_no_results(clone):
    result = launch(clone, "demo", FAIL_ON="epo_jax.main")
    assert result.returncode != 0 and "Curves" not in result.stdout


def test_venv_is_reused_until_the_requirements_change(clone):
    for _ in range(2):
        assert launch(clone, "setup").returncode == 0
    assert len(calls(clone)) == 3
    with open(clone / "requirements" / "test.txt", "a") as file:
        file.write("# changed\n")
    launch(clone, "setup")
    assert len(calls(clone)) == 6


def test_an_interrupted_installation_is_made_again(clone):
    assert launch(clone, "setup", FAIL_ON="-r requirements.txt").returncode != 0
    assert launch(clone, "setup").returncode == 0
    assert "--editable ." in calls(clone)[-1]


@pytest.mark.parametrize(
    ("missing", "told"),
    [("cc", "a C compiler not found"), ("c++", r"a C++ compiler not found"), ("make", "make not found")],
)
def test_a_missing_compiler_is_told_before_pip(clone, missing, told):
    os.unlink(clone / "bin" / missing)
    result = launch(clone, "test")
    assert result.returncode == 2
    assert told in result.stderr and "build-essential" in result.stderr and result.stderr.count("\n") == 1
    assert not calls(clone) and not (clone / ".venv").exists()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WRONG_VERSION": "1"}, "only in other versions (python3.11)"),
        ({"NO_VENV": "1"}, "without its venv module"),
        ({"PYTHON": "python9"}, "is not installed"),
    ],
)
def test_an_unsuitable_python_is_told(clone, variables, told):
    result = launch(clone, "demo", **variables)
    assert result.returncode == 2
    assert told in result.stderr and result.stderr.count("\n") == 1
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("arguments", [[], ["train"]])
def test_other_words_are_refused_with_the_choices(clone, arguments):
    result = launch(clone, *arguments)
    assert result.returncode == 2 and "./launch/local demo" in result.stderr
