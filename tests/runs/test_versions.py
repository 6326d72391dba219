"""Run folders that earlier versions wrote.

tests/runs_of_version_1.zip holds a run of the toy game, with a critic and a reference, and a sweep of two members with adapters,
each after one of two RL steps, and the weights that the same version exported of them.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from epo_jax import evaluate, export, generate, report, sweep
from epo_jax import main as program
from epo_jax.common.errors import UserError
from epo_jax.runs import figures, lock, versions
from epo_jax.runs.folder import read_config, write_config
from epo_jax.runs.metrics import read_rows
from epo_jax.settings.config import ENVIRONMENTS, base_config, flatten
from epo_jax.settings.sweep import sweep_section

MEMBER = "grpo+epo-lr0.003-seed0"


@pytest.fixture
def old(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda folder: [])
    with zipfile.ZipFile(Path(__file__).with_name("runs_of_version_1.zip")) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def test_every_key_has_a_value_for_the_runs_of_an_earlier_version(old):
    """Whoever adds a setting declares what the versions before did, in `added`."""
    written = flatten(json.loads((old / "run" / "config.json").read_text())).keys()
    for name in ENVIRONMENTS:
        known = {key for key in flatten(base_config(name)) if not key.startswith("env.")}
        first = {key for key in written if not key.startswith("env.")}
        added = {key for keys in versions.KEYS_ADDED.values() for key in keys}
        renamed = {key: new for keys in versions.KEYS_REMOVED.values() for key, new in keys.items()}
        assert known - first <= added | set(renamed.values()), name
        assert first - known <= renamed.keys(), name


@pytest.mark.parametrize(("folder", "exported"), [("run", "run"), (f"sweep/members/{MEMBER}", "member")])
def test_an_old_policy_is_evaluated_played_and_exported(old, folder, exported, capsys):
    with lock.hold(old / folder):  # as beside a living run
        export.main(["export", f"--workdir={old / folder}", f"--to={old / 'out'}"])
        evaluate.main(["evaluate", f"--checkpoint={old / folder}", "--temperature=0"])
        generate.main(["generate", f"--checkpoint={old / folder}", "--play", "--split=train"])
    ours, theirs = load_file(old / "out" / "model.safetensors"), load_file(old / "exported" / f"{exported}.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert "valid_seen after 1 RL steps" in capsys.readouterr().out


def test_an_old_run_goes_on_to_its_end(old, capsys):
    program.main(["main", f"--workdir={old / 'run'}", "--resume"])
    assert [row["step"] for row in read_rows(old / "run" / "metrics.jsonl")] == [0, 1]
    report.main(["report", str(old / "run"), str(old / "sweep"), f"--out={old / 'report.html'}"])
    assert (old / "report.html").exists()


def test_an_old_sweep_goes_on_to_its_end(old):
    sweep.main(["sweep", f"--workdir={old / 'sweep'}", "--resume"])
    for member in (old / "sweep" / "members").iterdir():
        assert [row["step"] for row in read_rows(member / "metrics.jsonl")] == [0, 1]


def test_keys_and_values_that_version_3_renamed_are_read(tmp_path):
    config = base_config("toy")
    config.epo.phase = "two_stage"
    write_config(config, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    algo = content["algo"]
    algo["released_mini_turns"], algo["released_micro_turns"] = 24, 6
    del algo["mini_batch_turns"], algo["micro_batch_turns"]
    content["epo"]["phase"] = "released"
    (tmp_path / "config.json").write_text(json.dumps(content | {"version": 2}))
    read = read_config(tmp_path)
    assert (read.algo.mini_batch_turns, read.algo.micro_batch_turns, read.epo.phase) == (24, 6, "two_stage")


def test_an_old_sweep_has_the_coefficients_that_came_later(old):
    path = old / "sweep" / "config.json"
    content = json.loads(path.read_text())
    del content["sweep"]["over"]["epo"]["lam"]
    path.write_text(json.dumps(content))
    sweep_of = read_config(old / "sweep").sweep
    assert flatten(sweep_of).keys() == flatten(sweep_section()).keys() and sweep_of.over.epo.lam == ()
    assert sweep_of.over.optim.lr == tuple(content["sweep"]["over"]["optim"]["lr"]) != ()
    content["sweep"]["seeds"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="config.json: the section sweep has the wrong keys or types"):
        read_config(old / "sweep")


def test_what_is_no_longer_read_is_told(old, monkeypatch, capsys):
    monkeypatch.setitem(versions.KEYS_REMOVED, 1, {"epo.lam": None, "optim.lr": "epo.lam"})
    added = {"optim.lr": lambda keys: keys["epo.alpha"] / 8, "env.hints": "none"}
    monkeypatch.setitem(versions.KEYS_ADDED, 1, versions.KEYS_ADDED[1] | added)
    config = read_config(old / "run")
    assert (config.epo.lam, config.optim.lr) == (3e-3, 0.25) and "hints" not in config.env
    assert "config.epo.lam=0.01 of an earlier version has no meaning any more" in capsys.readouterr().err
