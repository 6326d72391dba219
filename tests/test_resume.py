"""A run that was killed or asked to stop, and resumed, is the run that was left alone, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from benchmarks import kill
from epo_jax import main as program
from epo_jax.common import stopping
from epo_jax.common.errors import Stopped, UserError
from epo_jax.runs import figures, lock
from epo_jax.runs.folder import read_config
from epo_jax.runs.metrics import MetricWriter, read_rows
from epo_jax.runs.policies import load_run
from epo_jax.training import loop, sft

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
def no_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda folder: [])
        yield


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
        cwd=request.config.rootpath, capture_output=True, text=True,
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
        (loop, "evaluate", 1, "0 RL steps"),
        (loop, "collect", 1, "0 RL steps"),
        (loop, "choose_groups", 2, "1 RL steps"),
        (MetricWriter, "train", 1, "2 RL steps"),
        (loop, "evaluate", 1, "2 RL steps"),
        (loop, "evaluate", 2, "3 RL steps"),
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


def test_a_further_temperature_changes_nothing_else_and_a_stopped_evaluation_goes_on_with_what_is_left(
    alone, tmp_path, monkeypatch
):
    folder = tmp_path / "warmer"
    arguments = *ARGUMENTS, "--config.eval.also_temperatures=(2.0,)", "--config.eval.splits=('valid_seen', 'valid_unseen')"
    written, calls = MetricWriter.evaluation, []

    def asked_after_three_of_four(writer, row):
        calls.append(row)
        if len(calls) in (3, 3 + 4 + 3):  # all of step 0 again, and three of step 2
            os.kill(os.getpid(), signal.SIGTERM)
        return written(writer, row)

    monkeypatch.setattr(MetricWriter, "evaluation", asked_after_three_of_four)
    with pytest.raises(Stopped, match="0 RL steps"):
        run(folder, *arguments)
    with pytest.raises(Stopped, match="2 RL steps"):
        run(folder)
    run(folder)
    rows = read_rows(folder / "eval.jsonl")
    assert len(calls) == 3 + 3 * 4
    each = [(split, temperature) for split in ("valid_seen", "valid_unseen") for temperature in (2.0, None)]
    assert [(row["step"], row["split"], row.get("temperature")) for row in rows[4:]] == [(k, *e) for k in (2, 3) for e in each]
    assert {(row["split"], row.get("temperature")) for row in rows[:4]} == set(each)
    found = kill.ending(folder)
    for file in ("eval.jsonl", "trajectories.jsonl"):
        found[file] = [row for row in found[file] if row["split"] != "valid_seen" and "temperature" not in row]
    assert kill.differences(found, alone) == []
    hot, cold = ([row["turns"], row["score"], row["invalid_actions"]] for row in rows[-2:])
    assert hot != cold


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


@pytest.mark.parametrize("kind", [UserError, KeyboardInterrupt])
def test_a_save_under_way_is_waited_for_whatever_ends_the_loop(tmp_path, monkeypatch, capfd, kind):
    """The checkpoint after the first step is committed only after the second step has failed."""
    folder, failed = tmp_path / "run", threading.Event()

    def rename(source, target, original=os.rename):
        if os.fspath(target).endswith("checkpoints/1"):
            failed.wait(60)
        original(source, target)

    def train(writer, row, original=MetricWriter.train):
        if row["step"] == 1:
            threading.Timer(0.5, failed.set).start()
            raise kind("the game is damaged.")
        return original(writer, row)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(MetricWriter, "train", train)
    with pytest.raises(kind):
        run(folder, *ARGUMENTS)
    assert (folder / "checkpoints" / "1" / "state").is_dir()
    assert "Traceback" not in capfd.readouterr().err


def test_what_it_learns_with_may_change_and_is_recorded(alone, tmp_path, monkeypatch, capfd):
    """After updates that were skipped, as the message advises; what changes the state's arrays or meaning is refused."""
    folder, stuck = tmp_path / "run", loop.stuck
    monkeypatch.setattr(loop, "stuck", lambda metrics: True)
    with pytest.raises(UserError, match=f"last 1 RL steps.*--workdir={folder} --resume --config.optim.lr=RATE"):
        run(folder, *ARGUMENTS, "--config.train.max_skipped=1")
    monkeypatch.setattr(loop, "stuck", stuck)
    for key, told in (
        ("train.steps=4", "config.train.steps=4 differs from the run's 3, .* to train longer, .* --config.init_from.run="),
        ("train.steps=2", "config.train.steps=2 differs from the run's 3, which it keeps"),
        ("model.d_model=32", "config.model.d_model=32 differs"),
        ("algo.mini_batches=1", "config.algo.mini_batches=1 differs"),
        ("epo.history_index=turn", "config.epo.history_index='turn' in place of 'global' changes the arrays"),
        ("optim.rate=1", "config.optim.rate is not a key of the run's config"),
    ):
        with pytest.raises(UserError, match=told):
            run(folder, "--resume", f"--config.{key}")
    before = (folder / "config.json").read_text()
    with pytest.raises(UserError, match="config.train.max_skipped=3 differs from the run's 1; leave --config out"):
        run(folder, "--resume", ARGUMENTS[0], ARGUMENTS[1], ARGUMENTS[2])
    assert (folder / "config.json").read_text() == before
    run(folder, "--resume", "--config.train.max_skipped=3", "--config.optim.lr=1e-3")
    rows = [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 0, "key": "optim.lr", "old": 3e-3, "new": 1e-3},
        {"step": 0, "key": "train.max_skipped", "old": 1, "new": 3},
    ]
    config = read_config(folder)
    assert (config.optim.lr, config.train.max_skipped) == (1e-3, 3)
    assert "state['params']['embedding']" in kill.differences(kill.ending(folder), alone)


def test_a_run_goes_on_from_anothers_checkpoint(alone, tmp_path):
    """With everything it is that run, bit for bit; it may have more steps. With the weights alone it begins at step 0."""
    first = tmp_path / "first"
    run(first, *ARGUMENTS, "--config.checkpoint.keep=9")
    source = f"--config.init_from.run={first}", "--config.init_from.step=1"
    run(tmp_path / "rest", *ARGUMENTS, *source, "--config.init_from.state=everything")
    ending = kill.ending(tmp_path / "rest")
    assert [row["step"] for row in ending["metrics.jsonl"]] == [1, 2]
    written = {"metrics.jsonl", "eval.jsonl", "trajectories.jsonl"}
    assert set(kill.differences(ending, kill.ending(first))) <= written
    assert ending["metrics.jsonl"] == kill.ending(first)["metrics.jsonl"][1:]
    with pytest.raises(UserError, match="config.train.steps=3: .* 3 RL steps behind it; raise config.train.steps"):
        run(tmp_path / "over", *ARGUMENTS, f"--config.init_from.run={first}", "--config.init_from.state=everything")
    with pytest.raises(UserError, match="config.model.d_model=32 differs from 16, that of the run"):
        run(tmp_path / "over", *ARGUMENTS, *source, "--config.model.d_model=32")
    with pytest.raises(UserError, match="checkpoints/7 is not there; choose from"):
        run(tmp_path / "over", *ARGUMENTS, *source[:1], "--config.init_from.step=7")
    assert not (tmp_path / "over").exists()
    more = tmp_path / "more"
    run(more, *ARGUMENTS, f"--config.init_from.run={first}", "--config.init_from.state=everything", "--config.train.steps=4")
    assert [row["step"] for row in read_rows(more / "metrics.jsonl")] == [3]
    weights = tmp_path / "weights"
    run(weights, *ARGUMENTS, *source, "--config.train.steps=1", "--config.model.lora_rank=2")
    assert [row["step"] for row in read_rows(weights / "metrics.jsonl")] == [0]
    begun = load_run(weights, read_config(weights), 0).params
    theirs = load_run(first, read_config(first), 1).params
    np.testing.assert_array_equal(begun["embedding"], theirs["embedding"])
    np.testing.assert_array_equal(begun["layers"]["q_proj"], theirs["layers"]["q_proj"])


def test_a_run_whose_last_updates_were_skipped_says_so_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "stuck", lambda metrics: True)
    with pytest.raises(UserError, match="No update of the last 2 RL steps had a finite gradient: the run is over"):
        run(tmp_path / "run", *ARGUMENTS[:2], "--config.train.steps=2")
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


def test_a_second_process_in_a_run_folder_is_refused(tmp_path):
    with lock.hold(tmp_path / "run"), pytest.raises(UserError, match=f"is in use by process {os.getpid()} on"):
        run(tmp_path / "run", *ARGUMENTS)
    assert not (tmp_path / "run").exists()
