"""One process for each run folder."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from epo_jax.common.errors import UserError
from epo_jax.runs import lock

HOLD = """
import subprocess, sys, time
from epo_jax.runs import lock
with lock.hold(sys.argv[1]):
    subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)  # as an environment's process: outlives its parent
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path, request):
    """(a folder that another process holds, that process)"""
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=request.config.rootpath, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield folder, process
        process.kill()


def test_the_second_is_refused_with_the_first_ones_process_id(holder, monkeypatch):
    folder, process = holder
    monkeypatch.setattr(lock, "_PATIENCE", 0.0)
    told = rf"run is in use by process {process.pid} on {os.uname().nodename}; wait"
    for attempt in (lambda: lock.refuse(folder), lambda: lock.hold(folder).__enter__()):
        with pytest.raises(UserError, match=told):
            attempt()
    assert (folder / lock.NAME).read_text() == f"{process.pid} {os.uname().nodename}\n"


def test_the_kernel_releases_it_when_the_holder_is_killed(holder):
    folder, process = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    lock.refuse(folder)
    with lock.hold(folder):
        assert (folder / lock.NAME).read_text().startswith(f"{os.getpid()} ")


def test_what_was_made_for_the_lock_alone_goes_again(tmp_path):
    (tmp_path / "kept").mkdir()
    with lock.hold(tmp_path / "a" / "b", tmp_path / "kept"):
        assert (tmp_path / "a" / "b" / lock.NAME).exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]
    with lock.hold(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.json"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with lock.hold(tmp_path / "run"):
        assert "has no locks" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run cannot be written \(Not a directory\); choose another folder"):
        lock.hold(tmp_path / "file" / "run").__enter__()
