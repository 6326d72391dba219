"""Evaluation plays a fixed split whole."""

import jax
import pytest

from epo_jax.envs import toy
from epo_jax.envs.pool import EnvPool
from epo_jax.evaluate import evaluate
from epo_jax.metrics import wilson
from epo_jax.models.decoder import DecoderConfig, init_params
from epo_jax.models.tokenizer import train_tokenizer
from epo_jax.rollout import RolloutConfig

TOKENIZER = train_tokenizer([toy.GOAL, "you see a red door. the number is 3."], 400)
MODEL = DecoderConfig(TOKENIZER.vocab_size, 16, 1, 2, 1, 8, 16)
SETTINGS = RolloutConfig(slots=4, max_turns=2, max_tokens=160, max_policy_tokens=64, response_tokens=5, style="bare")


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


def run(params, tasks, seed=0):
    with EnvPool("toy", {}, 1) as pool:
        return evaluate("valid_seen", tasks, 5, pool, TOKENIZER, MODEL, params, SETTINGS, 0.4, seed)


def test_fault_11_every_episode_of_the_split_is_played_once(params):
    tasks = toy.list_tasks("valid_seen", {})
    row, trajectories = run(params, tasks)
    assert [t.task for t in trajectories] == tasks
    assert (row["step"], row["split"], row["episodes"]) == (5, "valid_seen", len(tasks))
    assert row["won"] == sum(t.won for t in trajectories)
    assert (row["low"], row["high"]) == pytest.approx(wilson(row["won"], len(tasks)))
    assert {kind: n for kind, (_, n) in row["types"].items()} == {"red": 5, "blue": 5, "green": 5}


def test_two_evaluations_of_the_same_parameters_agree(params):
    tasks = toy.list_tasks("valid_seen", {})[:4]
    first, again, other = (run(params, tasks, seed)[1] for seed in (0, 0, 1))
    assert [t.tokens for t in first] == [t.tokens for t in again]
    assert [t.tokens for t in first] != [t.tokens for t in other]
