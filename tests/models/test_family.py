"""Every kind of model folder through a run: load, sample, learn, save, export; and what transformers makes of both ends."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from epo_jax import export
from epo_jax.common.errors import UserError
from epo_jax.models import generate
from epo_jax.models.decoder import bind
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.runs import checkpoint
from epo_jax.runs.folder import write_config
from epo_jax.runs.policies import load_pretrained
from epo_jax.training.batch import step_batch
from epo_jax.training.from_config import learner_config, objective_and_hyper
from epo_jax.training.state import init_state
from epo_jax.training.step import make_train_step
from tests.models import family
from tests.toy_sweep import get_config

EPISODES, PROMPT, ANSWER = 4, 256, 12
OBSERVATIONS = ["You see a red door.", "take apple 1 from cabinet 3", "a drawer 1", "º, µ and Ω"]


def config_of(folder):
    config = get_config()
    del config.sweep
    config.model.path = str(folder)
    config.agent.update(max_tokens=PROMPT + ANSWER, response_tokens=ANSWER)
    config.train.update(rows_tokens=PROMPT + ANSWER, rows_policy_tokens=ANSWER)
    config.rollout.update(groups=2, group_size=2, slots=2)
    config.algo.update(mini_batches=1, micro_batch_rows=2)
    config.warm_start.episodes = 0
    return config


@functools.cache
def train_step(learner):
    return make_train_step(learner)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens):
    module = bind(model, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return module(tokens, positions, jnp.ones_like(tokens)) @ module.output_embedding().T


def play(tokenizer, model, params):
    """An answer to each observation, as trajectories of which the first of each group won."""
    prompts = [tokenizer.first(text) for text in OBSERVATIONS]
    tokens = np.zeros((EPISODES, PROMPT), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    ints = jnp.arange(EPISODES, dtype=jnp.int32)
    cache = generate.init_cache(model, EPISODES, PROMPT + ANSWER)
    counts = np.array(list(map(len, prompts)), np.int32)
    cache = generate.extend(model, params, cache, tokens, counts, jnp.ones(EPISODES, bool))
    stops = np.full(4, -1, np.int32)
    stops[: len(tokenizer.stop_ids)] = tokenizer.stop_ids
    how = generate.Sampling(jnp.ones(EPISODES), 0 * ints, jnp.ones(EPISODES))
    given = jax.random.key(0), ints, 0 * ints, 0 * ints, 0 * ints + ANSWER, how, stops, ANSWER
    _, out = generate.decode(model, params, cache, *given)
    played = []
    for i, prompt in enumerate(prompts):
        count = int(out.counts[i])
        trajectory = Trajectory(task={"id": str(i // 2), "type": "t"}, group=i // 2, observations=[OBSERVATIONS[i]])
        trajectory.append_prompt(prompt)
        said = [np.asarray(x[i, :count]).tolist() for x in (out.tokens, out.log_prob, out.entropy)]
        trajectory.append_answer(*said)
        assert tokenizer.decode(said[0]) is not None and max(said[0]) < family.TOKENS
        trajectory.actions.append("")
        trajectory.valid.append(True)
        trajectory.rewards.append(10.0 * (i % 2))
        played.append(trajectory)
    return played


@pytest.mark.parametrize("name", family.CASES)
def test_a_model_folder_from_its_files_to_its_export(name, tmp_path):
    case = family.CASES[name]
    stored = family.tensors(case.stated)
    folder = family.write(tmp_path / "model", case)
    config = config_of(folder)

    # ---- load
    tokenizer, model, params = load_pretrained(config)
    np.testing.assert_array_equal(params["embedding"], stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["layers"]["o_proj"][1].T, stored["model.layers.1.self_attn.o_proj.weight"])
    assert ("lm_head" in params) != case.stated["tie_word_embeddings"]
    assert model.unused_ids == ((family.TOKENS, family.ROWS),)
    same_as_transformers(folder, tokenizer, model, params)

    # ---- sample, and one training step
    played = play(tokenizer, model, params)
    objective, hyper = objective_and_hyper(config)
    learner = learner_config(config, model, objective)
    batch = step_batch(config, objective, 0, played, learner.micro_rows)
    state = init_state(learner, jax.tree.map(jnp.copy, params))
    state, metrics = train_step(learner)(state, batch, hyper)
    metrics = jax.device_get(metrics)
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert abs(metrics["ratio_max"] - 1) < 1e-4 and abs(metrics["ratio_min"] - 1) < 1e-4  # the learner scores what was sampled
    assert np.abs(state.params["embedding"] - params["embedding"]).max() > 1e-4
    # Rows that no token has get no gradient: weight decay alone moves them.
    unused = [x["embedding"][family.TOKENS :] for x in (state.params, params)]
    np.testing.assert_allclose(unused[0], (1 - hyper.lr * learner.optim.weight_decay) * unused[1], rtol=1e-5)

    # ---- save and export
    run = tmp_path / "run"
    tokenizer.save(run / "tokenizer")
    write_config(config, run)
    manager = checkpoint.open_manager(checkpoint.place(run), 2)
    checkpoint.save(manager, state)
    manager.close()
    export.main(["export", f"--workdir={run}", f"--to={tmp_path / 'exported'}"])
    config.model.path = str(tmp_path / "exported")
    again, exported, learned = load_pretrained(config)
    assert exported == model and again.frame == tokenizer.frame and again.stop_ids == tokenizer.stop_ids
    jax.tree.map(np.testing.assert_array_equal, learned, state.params)
    same_as_transformers(tmp_path / "exported", again, exported, learned)
    for file in ("config.json", "generation_config.json"):
        ends = json.loads((tmp_path / "exported" / file).read_text())["eos_token_id"]
        assert set(ends if isinstance(ends, list) else [ends]) == set(tokenizer.stop_ids)
    begins = json.loads((folder / "tokenizer_config.json").read_text()).get("bos_token")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "exported")
    assert theirs.bos_token_id == (begins and tokenizer.backend.token_to_id(begins))


def same_as_transformers(folder, tokenizer, model, params):
    """What transformers reads of a folder: settings and prompts, and where torch is installed the logits."""
    theirs = transformers.AutoConfig.from_pretrained(folder)
    assert theirs.architectures == [{"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[theirs.model_type] + "ForCausalLM"]
    assert theirs.tie_word_embeddings == model.tie_embeddings and theirs.vocab_size == model.vocab_size
    assert theirs.max_position_embeddings == model.max_positions
    kept = {key: value for key, value in theirs.rope_parameters.items() if key != "type"}
    assert kept == {"rope_type": "default", "rope_theta": model.rope_theta} | dict(model.rope_scaling)
    if not (folder / "vocab.json").exists():  # whose pre-tokenizer transformers takes from the class
        spoken = transformers.AutoTokenizer.from_pretrained(folder)
        messages = [{"role": "user", "content": OBSERVATIONS[0]}]
        text = spoken.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert spoken.encode(text, add_special_tokens=False) == tokenizer.first(OBSERVATIONS[0])
    if importlib.util.find_spec("torch"):
        import torch

        network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokens = np.random.default_rng(0).integers(0, family.TOKENS, (1, 64))
        with torch.no_grad():
            wanted = network(torch.from_numpy(tokens)).logits.numpy()
        assert wanted.std() > 0.5
        np.testing.assert_allclose(logits(model, params, jnp.asarray(tokens, jnp.int32)), wanted, atol=2e-4, rtol=0)


def test_a_model_of_fewer_positions_than_a_context_is_refused(tmp_path):
    case = family.CASES["qwen2"]
    folder = family.write(tmp_path, dataclasses.replace(case, stated=case.stated | {"max_position_embeddings": 200}))
    with pytest.raises(UserError, match="config.agent.max_tokens=268 exceeds the 200 positions"):
        load_pretrained(config_of(folder))
