"""A run that was killed or asked to stop, and resumed, is the run that was left alone, bit for bit."""

import os
import signal
import subprocess
import sys

import jax
import pytest

from benchmarks import kill
from epo_jax import figures, rollout
from epo_jax import main as program
from epo_jax.errors import Stopped, UserError
from epo_jax.metrics import MetricWriter

# Ends the process when the checkpoint after `STEP` is written but not committed.
KILLED = """
import os, signal, sys
rename = os.rename
def killing(source, target):
    if os.fspath(target).endswith("checkpoints/" + sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = killing
from epo_jax.main import main
main(["main", *sys.argv[2:]])
"""
ARGUMENTS = f"--config={kill.__file__}", "--config.warm_start.steps=10", "--config.train.steps=3"


@pytest.fixture(scope="module", autouse=True)
def quick():
    """What counts here is the time to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda folder: [])
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def run(folder, *arguments):
    program.main(["main", f"--workdir={folder}", *(arguments or ["--resume"])])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "alone"
    run(folder, *ARGUMENTS)
    return kill.ending(folder)


def test_killed_while_a_checkpoint_is_written(alone, tmp_path, request):
    folder = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "2", f"--workdir={folder}", *ARGUMENTS],
        cwd=request.config.rootpath, env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert {f.name for f in (folder / "checkpoints").iterdir() if f.name.isdigit()} == {"0", "1"}
    assert list((folder / "checkpoints").glob("2*tmp*"))
    run(folder)
    assert kill.differences(kill.ending(folder), alone) == []
    assert not list((folder / "checkpoints").glob("*tmp*"))


def test_asked_to_stop_between_rollout_and_update_and_at_the_end_of_a_step(alone, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "stopped"

    def asked(inner, call):
        """`inner`, whose `call`-th call comes with a SIGTERM."""
        calls = []

        def outer(*arguments):
            calls.append(arguments)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(*arguments)

        return outer

    before = signal.getsignal(signal.SIGTERM)
    for where, name, call, steps in ((rollout, "choose_groups", 2, 1), (MetricWriter, "train", 1, 2)):
        with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"{steps} RL steps done and saved.*--resume"):
            patch.setattr(where, name, asked(getattr(where, name), call))
            run(folder, *(("--resume",) if folder.exists() else (*ARGUMENTS, "--profile_steps=0:3")))
        assert signal.getsignal(signal.SIGTERM) == before
        assert "ask again to end at once" in capfd.readouterr().err
        assert len(list((folder / "profile").rglob("*.xplane.pb"))) == 1  # what the first stop cut short
    run(folder)
    assert kill.differences(kill.ending(folder), alone) == []


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(tmp_path):
    folder = tmp_path / "run"
    run(folder, *ARGUMENTS[:2], "--config.train.steps=1", f"--config.checkpoint.folder={tmp_path / 'elsewhere'}")
    assert not (folder / "checkpoints").exists() and (tmp_path / "elsewhere" / "1").is_dir()
    with pytest.raises(UserError, match="elsewhere already holds the checkpoints of a run"):
        run(tmp_path / "other", *ARGUMENTS, f"--config.checkpoint.folder={tmp_path / 'elsewhere'}")
    assert not (tmp_path / "other").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="holds none of the run's checkpoints"):
        run(folder)
