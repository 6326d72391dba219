"""A model from a folder, from its weights to what was learned: adapters trained on it, resumed and exported."""

import shutil

import numpy as np
import pytest

from benchmarks import kill
from epo_jax import export
from epo_jax import main as program
from epo_jax.envs.base import environment
from epo_jax.metrics import read_rows
from epo_jax.models import hf_config, weights
from epo_jax.models.decoder import decoder_config
from tests.toy_sweep import get_config

CHANGES = ("warm_start.episodes=0", "model.lora_rank=2", "algo.kl_coef=0.01", "train.steps=2", "eval.every=0")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a model's tokenizer, config and weights, and a run that began with them."""
    folder = tmp_path_factory.mktemp("published")
    config = get_config()
    demonstrations = program.expert_demonstrations(config, environment("toy").list_tasks("train", {}))
    tokenizer = program.own_tokenizer(config, demonstrations)
    model = decoder_config(config.model)
    params = program.blank_params(config, model, tokenizer)
    weights.save_params(folder / "model", model, params)
    tokenizer.save(folder / "model")
    program.main([
        "main", "--config=tests/toy_sweep.py:single", f"--workdir={folder / 'run'}", f"--config.model.path={folder / 'model'}",
        *(f"--config.{change}" for change in CHANGES),
    ])  # fmt: skip
    return folder / "model", folder / "run"


def test_a_resumed_run_reads_no_weights_but_its_own(published, tmp_path):
    model, run = published
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "2")
    (model / "model.safetensors").rename(tmp_path / "away")
    try:
        program.main(["main", f"--workdir={again}", "--resume"])
    finally:
        (tmp_path / "away").rename(model / "model.safetensors")
    assert kill.differences(kill.ending(run), kill.ending(again)) == []
    assert len(read_rows(again / "metrics.jsonl")) == 2


def test_what_was_learned_is_the_folders_model_with_its_adapters(published, tmp_path):
    model, run = published
    for name, options in (("merged", []), ("adapters", ["--adapters"])):
        export.main(["export", f"--workdir={run}", f"--to={tmp_path / name}", *options])
    config = hf_config.read_config(model, "float32", "none")
    first, merged = (weights.load_params(folder, config) for folder in (model, tmp_path / "merged"))
    moved = {key: not np.array_equal(first["layers"][key], merged["layers"][key]) for key in first["layers"]}
    assert any(moved.values()) and not all(moved.values())
    assert all(np.array_equal(first[key], merged[key]) for key in first if key != "layers")
    assert (tmp_path / "adapters" / "adapter_config.json").exists()
