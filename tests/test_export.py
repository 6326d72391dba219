"""A run's checkpoint as a Hugging Face folder."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from epo_jax import export
from epo_jax.common.errors import UserError
from epo_jax.models import hf_config, lora, weights
from epo_jax.models.decoder import DecoderConfig, decoder_config, init_params, with_adapters
from epo_jax.models.tokenizer import load_tokenizer, train_tokenizer
from epo_jax.runs import checkpoint, frozen_base
from epo_jax.runs.folder import write_config
from epo_jax.settings.config import base_config
from epo_jax.training.from_config import learner_config, objective_and_hyper
from epo_jax.training.state import init_state
from tests.models import templates


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
    frozen_base.store(folder, model, state.base)
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
    trained = load_tokenizer(folder / "tokenizer")
    assert tokenizer.frame == trained.frame and tokenizer.first("apple 1") == trained.first("apple 1")


def test_another_user_may_read_all_of_it(run_folder, tmp_path):
    """Files have the permissions of any new file; safetensors' own are 0600."""
    before = os.umask(0o022)
    try:
        export.main(["export", f"--workdir={run_folder[0]}", f"--to={tmp_path / 'out'}"])
        lora.save_adapters(tmp_path / "out", run_folder[1], lora.split(run_folder[2].policy())[1], "base")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, 0o644)
    assert {"model.safetensors", "adapter_model.safetensors", "tokenizer.json", "generation_config.json"} <= modes.keys()


def test_weights_in_half_the_bytes(run_folder, tmp_path):
    for dtype in ("float32", "bfloat16"):
        export.main(["export", f"--workdir={run_folder[0]}", f"--to={tmp_path / dtype}", f"--dtype={dtype}"])
        assert json.loads((tmp_path / dtype / "config.json").read_text())["torch_dtype"] == dtype
    config = hf_config.read_config(tmp_path / "bfloat16", "float32", "none")
    whole, half = (weights.load_params(tmp_path / dtype, config) for dtype in ("float32", "bfloat16"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype("bfloat16").astype("float32"), b), whole, half)
    sizes = [(tmp_path / dtype / "model.safetensors").stat().st_size for dtype in ("float32", "bfloat16")]
    assert 1.8 < sizes[0] / sizes[1] < 2.0


def test_a_clients_system_message_is_part_of_the_users(run_folder, tmp_path):
    """A model from scratch has seen none: it stands before the message, on a line of its own."""
    from transformers import PreTrainedTokenizerFast

    export.main(["export", f"--workdir={run_folder[0]}", f"--to={tmp_path / 'out'}"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    system, user = {"role": "system", "content": "Be quick."}, {"role": "user", "content": "a door"}
    said, tool = {"role": "assistant", "content": "look"}, {"role": "tool", "content": "12:00"}

    def rendered(*messages):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    assert rendered(system, user) == "Be quick.\na door<|agent|>"
    assert rendered(user, said, tool, user) == "a door<|agent|>look<|end|>12:00\na door<|agent|>"
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings == {"do_sample": True, "temperature": 0.4, "top_k": 0, "top_p": 1.0, "eos_token_id": 2, "pad_token_id": 0}
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 2


@pytest.fixture(scope="module")
def pretrained_run(tmp_path_factory):
    """A run that began with a published model, as it stands after no step; the model's folder."""
    folder = tmp_path_factory.mktemp("pretrained")
    source, run = templates.write(folder / "model", templates.CASES["llama 3.1"]), folder / "run"
    (source / "chat_template.jinja").write_text(templates.CASES["llama 3.1"].template)
    config = base_config()
    config.model.path, config.algo.kl_coef = str(source), 0.0
    model = DecoderConfig(load_tokenizer(source).vocab_size, 16, 1, 2, 1, 8, 16, dtype="float32")
    params = init_params(model, jax.random.key(0))
    weights.save_params(source, model, params)
    load_tokenizer(source).save(run / "tokenizer")
    write_config(config, run)
    with checkpoint.open_manager(checkpoint.place(run), 2) as manager:
        checkpoint.save(manager, init_state(learner_config(config, model, objective_and_hyper(config)[0]), params))
    return source, run


def test_a_published_model_keeps_its_own_files(pretrained_run, tmp_path):
    source, run = pretrained_run
    export.main(["export", f"--workdir={run}", f"--to={tmp_path / 'out'}"])
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"config.json", "model.safetensors"}
    ours, theirs = load_tokenizer(tmp_path / "out"), load_tokenizer(source)
    assert ours.frame == theirs.frame and ours.stop_ids == theirs.stop_ids and len(ours.stop_ids) == 3
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(stated["eos_token_id"]) == sorted(ours.stop_ids) and stated["bos_token_id"] == ours.role_ids["bos"]


def test_what_ended_turns_ends_them_in_the_export(pretrained_run, tmp_path):
    """A ChatML base model whose files name <|endoftext|> alone: its turns ended with <|im_end|> too."""
    from transformers import GenerationConfig

    run = shutil.copytree(pretrained_run[1], tmp_path / "run")
    shutil.rmtree(run / "tokenizer")
    source = templates.write(tmp_path / "base", templates.CASES["chatml base"])
    load_tokenizer(source).save(run / "tokenizer")
    export.main(["export", f"--workdir={run}", f"--to={tmp_path / 'out'}"])
    tokenizer, before = load_tokenizer(source), json.loads((source / "generation_config.json").read_text())
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings == before | {"eos_token_id": list(tokenizer.stop_ids)} and len(tokenizer.stop_ids) == 2
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == list(tokenizer.stop_ids)
    # Of a folder that has none, the run's evaluation gives the settings.
    (source / "generation_config.json").unlink()
    shutil.rmtree(run / "tokenizer")
    load_tokenizer(source).save(run / "tokenizer")
    export.main(["export", f"--workdir={run}", f"--to={tmp_path / 'again'}"])
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["temperature"] == 0.4


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
