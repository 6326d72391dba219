"""Environments by name, and the guide to writing one, followed to the letter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from epo_jax.common.errors import UserError
from epo_jax.envs import base
from epo_jax.runs.folder import read_config
from tests import xla

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "environments.md").read_text()


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """A folder with the guide's files; the blocks of one file follow each other in the text."""
    folder = tmp_path_factory.mktemp("guide")
    game, config, more = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len([line for line in game.splitlines() if line.strip()]) <= 30  # as it promises
    (folder / "guess.py").write_text(f"{game}\n\n{more}")
    (folder / "guess_config.py").write_text(config)
    return folder


def run(folder, *arguments, said=""):
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla.of_command(*xla.QUICK)}, input=said,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_guides_environment_trains_as_it_says(guide):
    (command,) = re.findall(r"epo-jax (train .*)", GUIDE)
    said = run(guide, "epo_jax", *command.split(), "--config.train.steps=1", "--config.warm_start.steps=2")
    assert "step 1/1" in said and "valid_unseen after 1 RL steps" in said and "high" in said
    assert "15 training tasks" in said
    kept = read_config(guide / "runs" / "guess")  # as --resume reads it
    assert (kept.env.name, kept.env.max_turns, kept.train.steps) == ("guess", 8, 1)


def test_every_registered_environment_is_there():
    for name in base.ENVIRONMENTS:
        found = base.environment(name)
        assert found.module == base.ENVIRONMENTS[name] and callable(found.prepare)
    assert base.environment("scienceworld").slots_per_worker == 32
    assert base.environment("toy").slots_per_worker is None and base.environment("toy").phrases == ""


@pytest.mark.parametrize("name", ["nowhere", "epo_jax.envs.nowhere", "alfworl", "", "../guess.py"])
def test_unknown_names_are_refused(name):
    message = f"env.name={name!r} is not an environment; choose one of alfworld, scienceworld, toy, or name a module"
    with pytest.raises(UserError, match=re.escape(message)):
        base.environment(name)


def test_a_module_that_is_no_environment_is_refused(guide, monkeypatch):
    with pytest.raises(UserError, match="env.name='json' is no environment, as the module has no function 'list_tasks'"):
        base.environment("json")
    monkeypatch.syspath_prepend(str(guide))
    (guide / "broken.py").write_text("import a_package_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        base.environment("broken")


def test_an_environment_without_an_expert_says_so():
    lonely = base.environment("tests.envs.workers.faulty_env")
    assert lonely.prepare({}) is None
    with pytest.raises(UserError, match="has no expert demonstrations; set config.warm_start.episodes=0"):
        lonely.demonstrations([], {})
    with pytest.raises(UserError, match="cannot rename its expert episodes; set config.warm_start.copies=0"):
        lonely.rename([], 0)


@pytest.mark.parametrize("fields", [{"text": ""}, {"text": "a room", "goal": "g", "won": True, "objects": ("box",)}])
def test_an_observation_comes_back_from_json(fields):
    observation = base.Observation(**fields)
    written = json.dumps(base.to_fields(observation))
    assert base.from_fields(json.loads(written)) == observation
    assert json.loads(written).keys() == fields.keys()
