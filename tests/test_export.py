"""A run's checkpoint as a Hugging Face folder."""

import json

import jax
import numpy as np
import pytest

from epo_jax import checkpoint, export
from epo_jax.command import write_config
from epo_jax.config import base_config
from epo_jax.errors import UserError
from epo_jax.main import learner_config, objective_and_hyper
from epo_jax.models import hf_config, lora, weights
from epo_jax.models.decoder import decoder_config, init_params, with_adapters
from epo_jax.models.tokenizer import load_tokenizer, train_tokenizer
from epo_jax.train_state import init_state


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run that trained adapters on a model from scratch, and the state it saved."""
    folder = tmp_path_factory.mktemp("run")
    config = base_config()
    config.model.update(path="", d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, d_ff=40, vocab_size=300)
    config.model.lora_rank = 2
    config.algo.kl_coef = 0.0
    write_config(config, folder)
    tokenizer = train_tokenizer(["take apple 1 from cabinet 3"], 300)
    tokenizer.save(folder / "tokenizer")
    model = with_adapters(decoder_config(config.model), config.model)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    state = init_state(learner_config(config, model, objective_and_hyper(config)[0]), params)
    manager = checkpoint.open_manager(checkpoint.place(folder), 2)
    checkpoint.save(manager, state)
    manager.close()
    return folder, model, state


def test_the_policy_with_its_adapters_and_its_frame(run_folder, tmp_path, capsys):
    folder, model, state = run_folder
    export.main(["export", f"--workdir={folder}", f"--to={tmp_path / 'out'}"])
    config = hf_config.read_config(tmp_path / "out", "float32", "none")
    merged = lora.merge(model, state.policy())
    jax.tree.map(np.testing.assert_array_equal, weights.load_params(tmp_path / "out", config), merged)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == tokenizer.stop_id
    # What transformers makes of the folder's chat template is the conversation as it was trained.
    (tmp_path / "out" / "chat_frame.json").unlink()
    theirs = load_tokenizer(tmp_path / "out")
    assert theirs.frame == tokenizer.frame and theirs.first("apple 1") == tokenizer.first("apple 1")


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--adapters"], "adapters of a published model"),
        (["--to=."], "exists already"),
        (["--step=7"], "checkpoints/7"),
        (["--step=x"], "invalid int value: 'x'"),
    ],
)
def test_what_cannot_be_exported_is_refused(run_folder, tmp_path, arguments, culprit):
    with pytest.raises(UserError, match=culprit):
        export.main(["export", f"--workdir={run_folder[0]}", f"--to={tmp_path / 'out'}", *arguments])
    assert not (tmp_path / "out").exists()
