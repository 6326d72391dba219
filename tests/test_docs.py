"""docs/method.md names code and config keys: they must exist, and none may be missing."""

import importlib
import re
from pathlib import Path

from epo_jax.objectives import registry
from epo_jax.settings.config import base_config, flatten

TEXT = (Path(__file__).parents[1] / "docs" / "method.md").read_text()
NAMES = re.findall(r"`([a-z_]+\.[a-z_]+)(?:=[^`]*)?`", TEXT)
MODULES = ("advantages", "controls", "entropy", "head", "loss", "policy", "registry", "released_rows", "value")


def test_config_keys_exist():
    known = flatten(base_config())
    sections = {key.partition(".")[0] for key in known}
    named = {name for name in NAMES if name.partition(".")[0] in sections}
    code = {"rollout.choose_groups"}
    assert len(named) > 30 and named - code <= known.keys(), named - code - known.keys()


def test_functions_exist():
    named = [name.split(".") for name in NAMES if name.partition(".")[0] in MODULES and not name.endswith(".py")]
    assert len(named) > 15
    for module, function in named:
        assert hasattr(importlib.import_module(f"epo_jax.objectives.{module}"), function), f"{module}.{function}"


def test_every_coefficient_and_every_arm_is_explained():
    keys = {key for key in flatten(base_config()) if key.startswith(("epo.", "algo.", "control."))}
    mechanics = {"algo.epochs", "algo.mini_batches", "algo.micro_batch_rows"}
    assert keys - mechanics <= set(NAMES), keys - mechanics - set(NAMES)
    for arm in (*registry.BASES, *registry.OVERLAYS):
        assert f"`{arm}`" in TEXT, arm
