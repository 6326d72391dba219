"""A run that was killed or asked to stop, and resumed, is the run that was left alone, bit for bit."""

import os
import signal
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import kill
from epo_jax import figures, rollout, sft, stopping
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
def quick(tmp_path_factory):
    """What counts here is the time to compile."""
    settings = {"jax_disable_most_optimizations": True, "jax_persistent_cache_min_compile_time_secs": 0.0}
    settings["jax_compilation_cache_dir"] = str(tmp_path_factory.mktemp("cache"))
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda folder: [])
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
        compilation_cache.reset_cache()
        for name, value in before.items():
            jax.config.update(name, value)


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


def test_asked_to_stop_wherever_a_run_can_be(alone, tmp_path, monkeypatch, capfd):
    """In the warm start, in a rollout, between it and the update, after the update, in every evaluation."""
    folder = tmp_path / "stopped"

    def asked(inner, call):
        """`inner`, whose `call`-th call comes with a signal."""
        calls = []

        def outer(*arguments, **named):
            calls.append(arguments)
            if len(calls) == call:
                os.kill(os.getpid(), (signal.SIGTERM, signal.SIGHUP)[len(points) % 2])
            return inner(*arguments, **named)

        return outer

    points = [
        (sft, "Cloning", 4, "4 updates of the warm start"),
        (sft, "Cloning", 3, "7 updates of the warm start"),
        (program, "evaluate", 1, "0 RL steps"),
        (rollout, "collect", 1, "0 RL steps"),
        (rollout, "choose_groups", 2, "1 RL steps"),
        (MetricWriter, "train", 1, "2 RL steps"),
        (program, "evaluate", 1, "2 RL steps"),
        (program, "evaluate", 2, "3 RL steps"),
    ]
    before = [signal.getsignal(number) for number in stopping._SIGNALS]
    while points:
        where, name, call, said = points.pop(0)
        with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"{said} done and saved.*--resume"):
            patch.setattr(where, name, asked(getattr(where, name), call))
            arguments = ("--resume",) if folder.exists() else ARGUMENTS
            run(folder, *arguments, *(["--profile_steps=0:3"] if name == "choose_groups" else []))
        assert [signal.getsignal(number) for number in stopping._SIGNALS] == before
        assert "ask again to end at once" in capfd.readouterr().err
        assert (folder / "warm_start").exists() or name != "Cloning"
        if name == "choose_groups":
            assert len(list((folder / "profile").rglob("*.xplane.pb"))) == 1  # what the stop cut short
    run(folder)
    assert not (folder / "warm_start").exists()
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
