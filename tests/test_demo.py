"""The demonstration: its preset, and the policies that come with the package."""

import pytest

from epo_jax.configs import alfworld
from epo_jax.envs.base import environment
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models.decoder import decoder_config
from epo_jax.rollout import prompts
from epo_jax.runs.policies import Policy, load_pretrained
from epo_jax.settings.config import flatten
from epo_jax.training.evaluation import Evaluation, evaluate

GAMES = 18


def test_it_is_the_laptop_preset_with_another_beginning_and_fewer_steps():
    laptop, demo = (flatten(alfworld.get_config(preset)) for preset in ("laptop", "demo"))
    assert {key for key in demo if demo[key] != laptop[key]} == {
        "env.train_games", "env.valid_seen_games", "model.path", "warm_start.episodes", "train.steps", "eval.every",
        "eval.splits", "checkpoint.every",
    }  # fmt: skip
    assert demo["env.train_games"] == demo["train.steps"] * demo["rollout.groups"], "each game is played in one RL step"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = alfworld.get_config("demo")
    config.env.update(train_games=1, valid_unseen_games=GAMES, data_dir=str(tmp_path_factory.mktemp("data")))
    return config


def load(config, path):
    config.model.path = str(path)
    return load_pretrained(config)


@pytest.mark.parametrize("path", [alfworld.POLICY, alfworld.AGENT], ids=["initial", "agent"])
def test_the_policies_are_models_of_the_laptop_preset(config, path):
    tokenizer, model, _ = load(config, path)
    own = decoder_config(alfworld.get_config("laptop").model)
    different = {name for name in vars(own) if getattr(own, name) != getattr(model, name)}
    assert different <= {"unused_ids", "vocab_size"} and tokenizer.vocab_size <= model.vocab_size
    assert sum(file.stat().st_size for file in path.iterdir()) < 2_000_000


def test_the_agent_wins_most_games_and_the_initial_policy_few(config, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    options = config.env.to_dict()
    tasks = environment("alfworld").list_tasks("valid_unseen", options)
    won = []
    with EnvPool("alfworld", options, 1) as pool:
        for path in (alfworld.POLICY, alfworld.AGENT):
            policy, settings = Policy(*load(config, path), config, 0), prompts.rollout_config(config)
            row, _ = evaluate(Evaluation("valid_unseen"), tasks, policy, pool, settings, prompts.SamplingConfig(0.4), 0)
            won.append(row["won"])
    initial, agent = won
    assert len(tasks) == GAMES and 1 <= initial <= GAMES / 2 and agent >= GAMES * 2 / 3
