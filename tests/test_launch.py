"""The quickstart script, with stand-ins for python and the compilers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.processes import xla_flags

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
    assert "-r requirements.txt" in made[0] and "--editable ." in made[1]
    assert made[2:5] == ["check .", "format --check .", "-m mypy"]
    assert made[5:] == [f"{PYTEST} -k wilson"]


def test_numerics_runs_tests_that_are_there_with_the_instructions_of_an_old_cpu(clone):
    """Flags that are set already come after, and so win."""
    assert launch(clone, "numerics", "-x", HOSTTYPE="x86_64", XLA_FLAGS="--xla_cpu_max_isa=AVX2").returncode == 0
    flags, command = (clone / "flags").read_text().strip(), calls(clone)[-1].split()
    assert flags == "--xla_cpu_max_isa=SSE4_2 --xla_cpu_max_isa=AVX2"
    assert command[:6] == PYTEST.split() and command[-1] == "-x"
    assert len(command) > 10 and all((ROOT / path).exists() for path in command[6:-1])


def test_numerics_is_left_out_on_other_cpus(clone):
    result = launch(clone, "numerics", HOSTTYPE="aarch64")
    assert result.returncode == 0 and "this one is aarch64" in result.stdout and "-m pytest" not in " ".join(calls(clone))


def test_commands_that_tests_start_are_compiled_for_the_same_cpu(monkeypatch):
    """conftest.py has added to what it was given; a command takes what was given, and its own."""
    monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_max_isa=SSE4_2 {os.environ['XLA_FLAGS']}")
    given = xla_flags("--own")
    assert given.startswith("--xla_cpu_max_isa=SSE4_2") and given.endswith(" --own")
    assert "device_count" not in given and "optimization_level" not in given


@pytest.mark.parametrize("failing", ["numerics", "test", ""])
def test_the_job_runs_both_and_fails_with_either(clone, failing):
    (clone / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", clone / ".ci" / "run")
    (clone / "launch" / "local").write_text('#!/usr/bin/env bash\necho "$1" >>calls\n[[ "$1" != "$FAIL_ON" ]]\n')
    done = subprocess.run(
        [clone / ".ci" / "run"], env={"PATH": str(clone / "bin"), "FAIL_ON": failing}, capture_output=True, text=True, timeout=60
    )
    assert calls(clone) == ["numerics", "test"] and (done.returncode != 0) == bool(failing), done.stderr


def test_demo_trains_the_laptop_preset_and_tells_where(clone):
    result = launch(clone, "demo", "--config.epo.lam=0")
    assert result.returncode == 0, result.stderr
    command = calls(clone)[-1].split()
    assert command[:3] == ["-m", "epo_jax.main", "--config=configs/alfworld.py:laptop"]
    assert command[3].startswith("--workdir=runs/demo-2") and command[4] == "--config.epo.lam=0"
    assert f"Results: {command[3].removeprefix('--workdir=')} " in result.stdout


def test_demo_tells_the_workdir_that_was_asked_for(clone):
    assert "Results: runs/mine " in launch(clone, "demo", "--workdir=runs/mine").stdout


def test_a_failed_demo_fails_and_claims_no_results(clone):
    result = launch(clone, "demo", FAIL_ON="epo_jax.main")
    assert result.returncode != 0 and "Results" not in result.stdout


def test_venv_is_reused_until_the_requirements_change(clone):
    for _ in range(2):
        assert launch(clone, "setup").returncode == 0
    assert len(calls(clone)) == 2
    with open(clone / "requirements.txt", "a") as file:
        file.write("# changed\n")
    launch(clone, "setup")
    assert len(calls(clone)) == 4


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
