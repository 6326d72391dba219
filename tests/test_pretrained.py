"""A model from a folder, from its weights to what was learned: adapters trained on it, resumed and exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import kill
from epo_jax import evaluate, export, generate
from epo_jax import main as program
from epo_jax.common.errors import UserError
from epo_jax.envs.base import environment
from epo_jax.models import hf_config, weights
from epo_jax.models.decoder import decoder_config
from epo_jax.runs import figures
from epo_jax.runs.folder import read_config
from epo_jax.runs.metrics import read_rows
from epo_jax.training.initial_policy import blank_params, expert_demonstrations, own_tokenizer
from tests.toy_sweep import get_config

CHANGES = ("warm_start.episodes=0", "model.lora_rank=2", "algo.kl_coef=0.01", "train.steps=2", "eval.every=0")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a model's tokenizer, config and weights, and a run that began with them."""
    folder = tmp_path_factory.mktemp("published")
    config = get_config()
    demonstrations = expert_demonstrations(config, environment("toy").list_tasks("train", {}))
    tokenizer = own_tokenizer(config, demonstrations)
    model = decoder_config(config.model)
    params = blank_params(config, model, tokenizer)
    weights.save_params(folder / "model", model, params)
    tokenizer.save(folder / "model")
    program.main([
        "main", "--config=tests/toy_sweep.py:single", f"--workdir={folder / 'run'}", f"--config.model.path={folder / 'model'}",
        *(f"--config.{change}" for change in CHANGES),
    ])  # fmt: skip
    return folder / "model", folder / "run"


def base_in_checkpoints(run) -> list[str]:
    return [path for path in (run / "checkpoints").rglob("*") if path.is_file() and b"base." in path.read_bytes()]


def test_a_run_whose_model_moved_is_named_its_base(published, tmp_path, monkeypatch):
    """Adapters need the model that they were trained on, and no other one, wherever it is; no checkpoint has a copy."""
    model, run = published
    again, moved = shutil.copytree(run, tmp_path / "again"), tmp_path / "moved"
    assert base_in_checkpoints(run) == []
    shutil.rmtree(again / "checkpoints" / "2")
    monkeypatch.chdir(tmp_path)
    model.rename(moved)
    named = "--config.model.path=moved"
    try:
        for command in (
            lambda *more: program.main(["main", f"--workdir={again}", "--resume", *more]),
            lambda *more: export.main(["export", f"--workdir={run}", f"--to={tmp_path / 'out'}", *more]),
            lambda *more: evaluate.main(["evaluate", f"--checkpoint={run}", *more]),
            lambda *more: generate.main(["generate", f"--checkpoint={run}", "--prompt=red", "--max_tokens=2", *more]),
        ):
            with pytest.raises(UserError, match=r"need the model that they were trained on.*--config.model.path=FOLDER"):
                command()
            command(named)
        other = shutil.copytree(moved, tmp_path / "other")
        decoder = hf_config.read_config(other, "float32", "none")
        params = weights.load_params(other, decoder)
        weights.save_params(other, decoder, params | {"final_norm": -params["final_norm"]})
        with pytest.raises(UserError, match=r"other is not the model that the adapters in .* were trained on"):
            evaluate.main(["evaluate", f"--checkpoint={run}", "--config.model.path=other"])
    finally:
        moved.rename(model)
    assert kill.differences(kill.ending(run), kill.ending(again)) == []
    assert len(read_rows(again / "metrics.jsonl")) == 2
    assert read_config(again).model.path == str(moved)
    told = {"step": 1, "key": "model.path", "old": str(model), "new": str(moved)}
    assert json.loads((again / "changes.jsonl").read_text()) == told


def test_a_run_of_all_weights_needs_its_model_no_more(published, tmp_path, monkeypatch):
    """Begun with relative paths, then read from elsewhere, after the model and the run folder have moved."""
    shutil.copytree(published[0], tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "draw", lambda folder: [])
    toy = f"--config={Path(__file__).with_name('toy_sweep.py')}:single"
    small = *(f"--config.{change}" for change in CHANGES if "lora" not in change), "--config.train.steps=1"
    program.main(["main", toy, "--workdir=run", "--config.model.path=model", "--config.checkpoint.folder=states", *small])
    assert read_config(Path("run")).model.path == str(tmp_path / "model")
    assert (tmp_path / "states" / "1").is_dir() and not (tmp_path / "run" / "checkpoints").exists()
    shutil.rmtree("model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "run").rename("moved")
    program.main(["main", "--workdir=moved", "--resume"])
    evaluate.main(["evaluate", "--checkpoint=moved"])
    export.main(["export", "--workdir=moved", "--to=out"])
    assert (tmp_path / "elsewhere" / "out" / "model.safetensors").exists()


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
