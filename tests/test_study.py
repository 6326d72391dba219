"""The study: its presets are sweeps that can begin, its script names them, and its resampling is exact."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import repetitions
from epo_jax.analysis.curves import CURVES
from epo_jax.analysis.measures import MEASURES
from epo_jax.configs import study
from epo_jax.runs.folder import write_config
from epo_jax.settings.sweep import COEFFICIENTS
from epo_jax.training.grid import programs, refuse_what_members_cannot_share

ROOT = Path(__file__).parents[1]
SCRIPT = (ROOT / "launch" / "study").read_text()
# Plays python: records every call, and makes the folder of a sweep.
PYTHON = """#!/bin/sh
echo "$*" >>calls
for word; do case $word in --workdir=*) mkdir -p "${word#*=}"; touch "${word#*=}/sweep.json" ;; esac; done
"""
DESIGNS = re.findall(r"^(\w+)\) start=(\w+) sweeps=\(([\w ]+)\)", SCRIPT, re.MULTILINE)


@pytest.mark.parametrize("preset", study.PRESETS)
def test_a_preset_is_a_sweep_whose_members_differ(preset):
    config = study.get_config(preset)
    if not preset.startswith("clones"):
        config.init_from.run = "study/clones/members/grpo-seed{seed}"
    refuse_what_members_cannot_share(config)
    members = sum(programs(config), [])
    names = {member.name for member in members}
    assert len(members) == len(names) and len(members) % len(config.sweep.seeds) == 0
    if not preset.startswith(("clones", "seeds", "ppo_unwhitened")):
        assert len(members) > len(config.sweep.seeds)


def test_the_script_runs_every_preset():
    starts = {start for _, start, _ in DESIGNS}
    sweeps = [preset for _, _, presets in DESIGNS for preset in presets.split()]
    assert sorted([*starts, *sweeps]) == sorted(study.PRESETS)
    for _, start, presets in DESIGNS:
        for preset in presets.split():
            assert (start == "clones_scienceworld") == (preset in study.SCIENCEWORLD)
            assert study.get_config(start).model == study.get_config(preset).model


def test_the_script_draws_panels_that_there_are():
    kinds = {"OOD", "final", "differences", "scatter", "by", *(curve.key for curve in CURVES)}
    for panel in " ".join(re.findall(r"panels=\(([^)]+)\)", SCRIPT)).split():
        kind, *rest = panel.split(":")
        assert kind in kinds, panel
        if kind == "by":
            assert rest.pop(0) in COEFFICIENTS, panel
        assert set(rest) <= {measure.key for measure in MEASURES}, panel


def test_the_script_begins_and_then_continues(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(PYTHON)
    (tmp_path / "launch" / "study").write_text(SCRIPT)
    (tmp_path / "launch" / "local").write_text("#!/bin/sh\n")
    for file in (python, tmp_path / "launch" / "study", tmp_path / "launch" / "local"):
        file.chmod(0o755)
    for _ in range(2):
        subprocess.run([tmp_path / "launch" / "study", "seeds", "--config.train.steps=9"], check=True, capture_output=True)
    begun, continued = (tmp_path / "calls").read_text().split("-m epo_jax.report")[:2]
    assert "--config=configs/study.py:clones_laptop --workdir=study/clones_laptop\n" in begun
    assert (
        "--config=configs/study.py:seeds --workdir=study/seeds --config.init_from.run=study/clones_laptop/members/grpo-seed0 "
        in begun
    )
    assert begun.endswith("--config.train.steps=9\n") and "--resume" not in begun
    assert continued.count("--resume") == 2 and "--config=" not in continued
    assert (tmp_path / "study" / "seeds.tar.xz").exists()


def test_differences_between_repetitions_are_those_of_the_exact_distribution(tmp_path):
    """One run against another of three, each judged by 16 of its 40 games."""
    won, games, episodes = np.array([[9, 12], [30, 20], [7, 36]]), 40, 16
    for i, of_run in enumerate(won):
        folder = tmp_path / "members" / f"seed{i}"
        folder.mkdir(parents=True)
        write_config(study.get_config("seeds"), folder)
        row = {"split": "valid_unseen", "episodes": games}
        rows = [row | {"step": 0, "won": 1}, *(row | {"step": 5 * k + 5, "won": int(w)} for k, w in enumerate(of_run))]
        rows += [row | {"step": 5, "won": 2, "temperature": 1.0}, row | {"step": 5, "won": 3, "split": "valid_seen"}]
        (folder / "eval.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    read, of = repetitions.evaluations(tmp_path, "valid_unseen")
    np.testing.assert_array_equal(read, won)
    assert of == games

    k = np.arange(episodes + 1)
    each = [stats.hypergeom(games, w, episodes).pmf(k) for w in won[:, 1]]
    cumulative = [np.prod([stats.hypergeom(games, w, episodes).cdf(k) for w in of_run], axis=0) for of_run in won]
    best = [np.diff(c, prepend=0.0) for c in cumulative]
    gap = np.abs(k[:, None] - k)
    for masses, which in ((each, False), (best, True)):
        found = repetitions.differences(won, games, 1, episodes, which)
        for points in (2, 5, 8):
            pairs = [np.outer(masses[a], masses[b])[gap >= points].sum() for a, b in ((0, 1), (0, 2), (1, 2))]
            assert np.mean(found >= 100 * points / episodes - 1e-9) == pytest.approx(np.mean(pairs), abs=0.005)
