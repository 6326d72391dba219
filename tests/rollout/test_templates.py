"""Runs under the chat templates of published models: rollout, cloning and transformers see the same tokens."""

import re

import jax
import pytest
from transformers import PreTrainedTokenizerFast

from epo_jax import generate
from epo_jax.common.errors import UserError
from epo_jax.envs import agent, toy
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models import weights
from epo_jax.models.decoder import DecoderConfig, init_params
from epo_jax.models.tokenizer import load_tokenizer
from epo_jax.rollout import prompts, scheduler
from epo_jax.rollout.collect import Player, collect
from epo_jax.rollout.episode import Answer, Episode
from epo_jax.rollout.lane import Lane
from epo_jax.runs import policies as folders
from epo_jax.settings.config import base_config
from epo_jax.training import sft
from tests.models import templates
from tests.models.templates import CASES

TASKS = toy.list_tasks("train", {})[4:7]
EPISODES = [Episode(i, task, i) for i, task in enumerate(TASKS)]
MODEL = DecoderConfig(500, 16, 1, 2, 1, 8, 16)
WINDOW = agent.Window(1)

# Without the template whose answers' header is the rollout's own (tests/models/test_chat_frame.py).
NAMES = [name for name in CASES if name != "no generation prompt"]


def settings(window, style="tagged"):
    return prompts.RolloutConfig(
        slots=2, max_turns=2, max_tokens=4000, max_policy_tokens=1000, response_tokens=400, style=style, window=window, block=400
    )


@pytest.fixture(scope="module")
def pool():
    with EnvPool("toy", {"name": "toy"}, 1) as pool:
        yield pool


def taught(monkeypatch, tokenizer, style):
    """Rollouts whose policy gives the expert's answers."""

    class Taught(Lane):
        def play(self, turns):
            answers = {}
            for row, turn in turns.items():
                seen = tokenizer.backend.decode(turn.prompt, skip_special_tokens=False).rpartition("you see a")[2]
                action = (re.findall(r"number is (\d)", seen) or re.findall(r"(\w+) door", seen))[-1]
                ids = tokenizer.answer(agent.expert_answer(action, style, tokenizer.frame.opened))
                answers[row] = Answer(ids, [0.0] * len(ids), [0.0] * len(ids))
            return answers

    monkeypatch.setattr(scheduler, "Lane", Taught)


def transformers_of(case):
    named = {"eos_token": case.eos, "bos_token": case.bos, "pad_token": case.pad}
    named = {role: token for role, token in named.items() if token}
    return PreTrainedTokenizerFast(tokenizer_object=templates.backend_of(case), chat_template=case.template, **named)


@pytest.mark.parametrize(
    ("name", "context"), [(n, c) for n in NAMES for c in ("window", "chat") if c == "window" or not CASES[n].rewrites]
)
def test_a_rollout_its_cloning_and_transformers_agree(name, context, pool, monkeypatch, tmp_path):
    case, tokenizer = CASES[name], load_tokenizer(templates.write(tmp_path, CASES[name]))
    config = settings(WINDOW if context == "window" else None)
    taught(monkeypatch, tokenizer, "tagged")
    params = init_params(MODEL, jax.random.key(0))
    player = Player(EPISODES, tokenizer, jax.random.key(0))
    (played,), _ = collect([player], params, pool, MODEL, config, prompts.SamplingConfig(1.0))
    theirs, opened = transformers_of(case), tokenizer.frame.opened
    for t, demonstration in zip(played, toy.demonstrations(TASKS, {}), strict=True):
        assert t.won and t.valid == [True, True] and tuple(t.actions) == demonstration.actions
        cloned = sft.to_trajectory(demonstration, tokenizer, config)
        assert (t.tokens, t.turn, t.starts) == (cloned.tokens, cloned.turn, cloned.starts)
        # What transformers renders, up to each turn: the agent's message, and an answer that goes on from what was opened.
        messages = []
        for turn, (message, answer) in enumerate(sft.transcript(demonstration, "tagged", config.window)):
            if context == "window":
                messages = []
            messages.append({"role": "user", "content": message})
            prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert t.tokens[t.starts[turn] if context == "window" else 0 : t.turn.index(turn)] == prompt
            said = tokenizer.decode(token for token, at in zip(t.tokens, t.turn, strict=True) if at == turn).strip()
            assert agent.parse_action(said, True, opened) == (t.actions[turn], True)
            assert (opened + said).count("<think>") == (opened + said).count("</think>") == 1
            assert "</think>" in opened or re.sub(r"\s", "", opened + said) == re.sub(r"\s", "", answer)
            messages.append({"role": "assistant", "content": opened + said})


@pytest.mark.parametrize("name", ["qwen3", "qwen3 without thinking", "r1 distill", "changes earlier turns", "qwen2.5"])
@pytest.mark.parametrize("style", ["tagged", "bare"])
def test_a_conversation_is_refused_where_earlier_turns_change(tmp_path, name, style):
    folder = templates.write(tmp_path, CASES[name])
    tokenizer = load_tokenizer(folder)
    model = DecoderConfig(tokenizer.vocab_size, 16, 1, 2, 1, 8, 16)
    weights.save_params(folder, model, init_params(model, jax.random.key(0)))
    config = base_config("toy")
    config.agent.style, config.model.path = style, str(folder)
    assert config.agent.context == "window" and folders.load_pretrained(config)[0].frame == tokenizer.frame
    config.agent.context = "chat"
    if not CASES[name].rewrites or (style == "bare" and CASES[name].rewrites == "thoughts"):
        folders.load_pretrained(config)
        return
    with pytest.raises(UserError, match="config.agent.context=window") as refusal:
        folders.load_pretrained(config)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_chat_says_what_it_cannot_keep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "Speaker", lambda *_: None)
    monkeypatch.setattr(generate, "_lines", lambda _: iter(()))
    for name in ("qwen3", "changes earlier turns"):
        tokenizer = load_tokenizer(templates.write(tmp_path / name.replace(" ", "-"), CASES[name]))
        policy = folders.Policy(tokenizer, MODEL, {}, None, None)
        if name == "qwen3":
            generate.chat(policy, None, 8)
            assert "drops the thoughts" in capsys.readouterr().err
        else:
            with pytest.raises(UserError, match="--prompt"):
                generate.chat(policy, None, 8)
