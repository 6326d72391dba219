"""The generation command: a prompt, a chat, and a trained agent in its game, on its own and with somebody cutting in."""

import dataclasses
import io
import re
import sys

import jax
import pytest

from epo_jax import generate
from epo_jax.common.errors import UserError
from epo_jax.envs import base
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models import weights
from epo_jax.models.decoder import decoder_config, init_params
from epo_jax.models.tokenizer import train_tokenizer
from epo_jax.rollout import prompts
from epo_jax.runs import checkpoint
from epo_jax.runs import policies as folders
from epo_jax.runs.folder import write_config
from epo_jax.settings.config import base_config
from epo_jax.training.evaluation import Evaluation, evaluate
from epo_jax.training.from_config import learner_config, objective_and_hyper
from epo_jax.training.state import init_state
from tests.envs import wander_env

TOKENIZER = train_tokenizer([wander_env.GOAL, " ".join(wander_env.WORDS)] * 4, 330)


def run_config(context):
    config = base_config("alfworld")
    config.agent.update(style="bare", context=context, response_tokens=5, max_tokens=160)
    config.env.update(max_turns=4)
    config.model.update(path="", d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16, dtype="float32")
    config.model.vocab_size = TOKENIZER.vocab_size
    config.train.update(steps=2, rows_tokens=160, rows_policy_tokens=64)
    return config


@pytest.fixture(scope="module", params=["chat", "window"])
def folder(request, tmp_path_factory):
    """A run folder as training leaves it, of an agent that has learnt nothing."""
    folder = tmp_path_factory.mktemp(request.param)
    config = run_config(request.param)
    write_config(config, folder)
    TOKENIZER.save(folder / "tokenizer")
    model = decoder_config(config.model)
    objective, _ = objective_and_hyper(config)
    state = init_state(learner_config(config, model, objective), init_params(model, jax.random.key(0)))
    with checkpoint.open_manager(checkpoint.place(folder), 2) as manager:
        checkpoint.save(manager, state)
    return folder, config, model, state.params


@pytest.fixture
def say(monkeypatch, capsys):
    monkeypatch.setitem(base.ENVIRONMENTS, "alfworld", "tests.envs.wander_env")

    def say(*arguments, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        generate.main(["generate", *map(str, arguments)])
        return capsys.readouterr().out

    return say


def told(output, name):
    return [line.removeprefix(f"{name}: ") for line in output.splitlines() if line.startswith(f"{name}: ")]


def test_it_plays_the_episodes_that_an_evaluation_counts(folder, say):
    path, config, model, params = folder
    tasks = wander_env.list_tasks("valid_seen", {})
    with EnvPool("alfworld", {}, 1) as pool:
        policy, settings = folders.Policy(TOKENIZER, model, params, config, 0), prompts.rollout_config(config)
        _, played = evaluate(Evaluation("valid_seen"), tasks, policy, pool, settings, prompts.SamplingConfig(0.9), 0)
    for number, task in ((2, "valid_seen-2"), (4, "4")):
        output = say(f"--checkpoint={path}", "--play", "--split=valid_seen", f"--task={task}", "--temperature=0.9")
        want = played[number]
        assert [a if a != "(none)" else "" for a in told(output, "action")] == want.actions
        assert [float(r) for r in told(output, "reward")] == want.rewards
        assert all(text in output for text in want.observations) and wander_env.GOAL in output
        assert output.rstrip().endswith(f"score 0, {len(want.actions)} turns")


def test_somebody_may_act_in_its_place(folder, say):
    output = say(f"--checkpoint={folder[0]}", "--interactive", typed="red door\n\nLEFT\n")
    actions = told(output, "action")
    assert actions[0] == "red door" and len(actions) <= 3 and (len(actions) < 3 or actions[2] == "left")
    assert output == say(f"--checkpoint={folder[0]}", "--interactive", typed="red door\n\nLEFT\n")


def test_without_a_folder_the_agent_of_the_demonstration_plays(tmp_path, monkeypatch, capsys):
    """One game is made, not all; no sentence of the game is cut at a width."""
    monkeypatch.setenv("EPO_JAX_DATA", str(tmp_path))
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    generate.main(["generate", "--play", "--task=1"])
    output = capsys.readouterr().out
    assert "generating 2 games" in output
    assert re.search(r"^won, score 100, \d+ turns$|^not won, score 0, 19 turns$", output, re.MULTILINE)
    assert max(map(len, output.splitlines())) > 100 and "\x1b" not in output
    with pytest.raises(UserError, match="name a folder first"):
        generate.main(["generate", "--prompt=x"])


def test_a_model_folder_answers_and_chats(tmp_path, say):
    config = run_config("chat")
    model = decoder_config(config.model)
    fresh = init_params(model, jax.random.key(1))
    stirred = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)
    weights.save_params(tmp_path, model, stirred)
    TOKENIZER.save(tmp_path)
    options = f"--checkpoint={tmp_path}", "--max_tokens=8", "--temperature=0"
    once = say(*options, "--prompt=red door")
    said = say(*options, typed="red door\ngreen wall\nred door\n").split("policy: ")
    assert len(said) == 1 + 3 and said[1] == once and any(said[1:])
    with pytest.raises(UserError, match="no run folder"):
        say(*options, "--play")


def test_the_room_is_what_the_model_has(tmp_path, say):
    """As of TinyLlama and SmolLM, whose 2,048 positions are fewer than the paper's contexts."""
    model = dataclasses.replace(decoder_config(run_config("chat").model), max_positions=64)
    weights.save_params(tmp_path, model, init_params(model, jax.random.key(1)))
    TOKENIZER.save(tmp_path)
    options = f"--checkpoint={tmp_path}", "--max_tokens=8", "--temperature=0"
    say(*options, "--prompt=red door")
    with pytest.raises(UserError, match="The prompt has .* of up to 8 do not fit in the 64 that there is room for.*--max_tokens"):
        say(*options, "--prompt=" + "red door " * 60)
    with pytest.raises(UserError, match="The conversation has .* the 64 that there is room for"):
        say(*options, typed="red door\n" * 9)
    config = run_config("chat")
    config.model.path = str(tmp_path)
    with pytest.raises(UserError, match="=160 exceeds the 64 positions.*set --config.agent.max_tokens=64 or less"):
        folders.load_pretrained(config)
    config.agent.max_tokens = 64
    assert folders.load_pretrained(config)[1].max_positions == 64


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--play", "--task=99"], "tasks 0 to 5"),
        (["--play", "--step=7"], "checkpoints of the steps 0"),
        (["--play", "--top_p=0"], "top_p"),
        (["--prompt=x", "--temperature=cold"], "temperature"),
        (["--plays"], "--plays"),
    ],
)
def test_bad_input_is_told_in_a_sentence(folder, say, arguments, culprit):
    with pytest.raises(UserError, match=culprit) as refusal:
        say(f"--checkpoint={folder[0]}", *arguments)
    assert "\n" not in str(refusal.value)
