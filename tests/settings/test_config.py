"""The keys of a run: paper values, presets, and the values that are refused."""

import dataclasses
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from epo_jax.command import parse_config
from epo_jax.common.errors import UserError
from epo_jax.models.decoder import decoder_config
from epo_jax.objectives import entropy, policy
from epo_jax.settings.columns import column_line
from epo_jax.settings.config import ENVIRONMENTS, base_config, flatten, settings_of
from epo_jax.settings.hyper import Choices, Hyper
from epo_jax.settings.table import SETTINGS
from epo_jax.settings.validate import validate
from epo_jax.training.from_config import learner_config, objective_and_hyper

ROOT = Path(__file__).parents[2]


def preset(env: str, name: str | None):
    get_config = importlib.import_module(f"epo_jax.configs.{env}").get_config
    return get_config(*([] if name is None else [name]))


@pytest.mark.parametrize("env", ["alfworld", "scienceworld"])
@pytest.mark.parametrize("name", [None, "paper", "laptop", "smoke"])
def test_every_preset_is_valid(env, name):
    validate(preset(env, name))


@pytest.mark.parametrize("env", ["alfworld", "scienceworld"])
def test_presets_add_no_keys(env):
    """A preset that misspells a key would otherwise add one that nothing reads."""
    for name in ("paper", "laptop", "smoke"):
        assert flatten(preset(env, name)).keys() == flatten(base_config(env)).keys()


def test_paper_is_the_default_and_holds_the_papers_table():
    alfworld, scienceworld = flatten(preset("alfworld", None)), flatten(preset("scienceworld", None))
    both = {"epo.lam": 0.001, "epo.kappa_l": 0.0, "epo.kappa_r": 2.0, "epo.gamma": 3.0, "rollout.temperature": 1.0}
    both |= {"rollout.groups": 16, "rollout.group_size": 8, "optim.lr": 5e-6, "eval.every": 5, "eval.temperature": 0.4}
    both |= {"agent.context": "window", "agent.history_turns": 2, "agent.max_tokens": 2048 + 512}
    both |= {"agent.response_tokens": 512, "epo.penalty": "hinge", "optim.weight_decay": 0.01, "algo.dual_clip": 3.0}
    for key, value in both.items():
        assert alfworld[key] == scienceworld[key] == value, key
    assert (alfworld["epo.alpha"], scienceworld["epo.alpha"]) == (0.1, 0.05)
    assert (alfworld["train.steps"], scienceworld["train.steps"]) == (150, 125)
    assert (alfworld["algo.mini_batch_turns"], scienceworld["algo.mini_batch_turns"]) == (256, 128)
    assert (alfworld["env.max_turns"], scienceworld["env.max_turns"]) == (50, 30)
    assert alfworld["model.path"].endswith("Qwen2.5-3B-Instruct")
    assert scienceworld["model.path"].endswith("Qwen2.5-7B-Instruct")


@pytest.mark.parametrize(
    ("env", "method", "numbers"),
    [
        ("alfworld", "ppo+epo", (128, 1, 5e-6, 256, 32)),
        ("alfworld", "grpo+epo", (16, 8, 5e-6, 256, 32)),
        ("scienceworld", "ppo", (128, 1, 3e-6, 64, 8)),
        ("scienceworld", "gigpo+epo", (16, 8, 5e-6, 128, 16)),
    ],
)
def test_the_papers_preset_has_the_column_of_the_method(env, method, numbers):
    """As a command has it, with the method after the file; a run's own folder then has numbers alone."""
    config = parse_config([f"--config=configs/{env}.py:paper", f"--config.algo.name={method}"])
    kept = ConfigDict(config.to_dict())
    for each in (config, kept):
        found = (
            each.rollout.groups,
            each.rollout.group_size,
            each.optim.lr,
            each.algo.mini_batch_turns,
            each.algo.micro_batch_turns,
        )
        assert found == numbers
    assert column_line(config).startswith(f"the paper's column for {'PPO' if 'ppo' in method else 'GRPO'} ")
    assert column_line(kept) is None
    objective, hyper = objective_and_hyper(config)
    assert objective.mini_batches_by == "turn" and hyper.critic_lr == hyper.lr == np.float32(numbers[2])
    assert (objective.num_trajectories, objective.mini_turns) == (128, numbers[3])
    learner = learner_config(config, decoder_config(config.model), objective)
    assert (learner.optim.schedule, learner.optim.updates) == ("step", config.train.steps)
    assert learner.critic_optim is None or learner.critic_optim.schedule == "constant"


def test_turns_that_a_method_cannot_cut_are_refused():
    """By the one method that cuts micro-batches by turn."""
    config = preset("alfworld", "laptop")
    config.algo.update(mini_batch_turns=24, micro_batch_turns=10)
    objective_and_hyper(config)
    config.algo.name = "grpo+released"
    with pytest.raises(UserError, match="mini_batch_turns=24 must be a multiple of config.algo.micro_batch_turns=10"):
        objective_and_hyper(config)


def test_a_key_that_is_set_does_not_follow_the_method():
    options = "--config.algo.name=ppo", "--config.rollout.group_size=2", "--config.rollout.groups=64"
    config = parse_config(["--config=configs/scienceworld.py", *options])
    assert (config.rollout.groups, config.rollout.group_size, config.algo.mini_batch_turns) == (64, 2, 64)
    assert "rollout" not in column_line(config) and "optim.lr=3e-06" in column_line(config)
    laptop = parse_config(["--config=configs/scienceworld.py:laptop", "--config.algo.name=ppo"])
    assert laptop.rollout.groups == 16 and column_line(laptop) is None


def test_unknown_preset_is_refused_with_the_choices():
    with pytest.raises(UserError, match="no preset 'huge'; choose one of 'paper', 'laptop', 'demo', 'smoke'"):
        preset("alfworld", "huge")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epo.kappa_l", -0.1, "epo.kappa_l=-0.1 must be zero or positive"),
        ("epo.kappa_r", -1.0, "epo.kappa_r=-1.0 must be"),
        ("epo.kappa_l", 2.5, "epo.kappa_l=2.5 must not exceed config.epo.kappa_r=2.0"),
        ("epo.lam", float("nan"), "epo.lam=nan is not a finite number"),
        ("epo.penalty", "soft", "'soft' is not known; choose one of 'hinge', 'indicator'"),
        ("epo.ema_decay", 1.0, r"in \[0, 1\)"),
        ("algo.clip_low", 1.0, "below 1"),
        ("algo.dual_clip", 1.0, "above 1"),
        ("algo.kl_place", "advantage", "choose one of 'loss', 'reward'"),
        ("algo.kl_target", 0.0, "algo.kl_target=0.0 must be positive"),
        ("control.peak_quantile", 1.5, r"control.peak_quantile=1.5 must be in \[0, 1\]"),
        ("control.shaping_kappa", 0.0, "control.shaping_kappa=0.0 must be positive"),
        ("control.cov_low", 6.0, "control.cov_low=6.0 must be below config.control.cov_high=5.0"),
        ("algo.importance_cap", -1.0, "importance_cap=-1.0 must be zero or positive"),
        ("rollout.group_size", 1, "at least 2 for config.algo.name='grpo.epo'"),
        ("seed", 2**32, "seed=4294967296 must be a whole number from 0 to 4294967295"),
        ("seed", -1, "seed=-1 must be a whole number from 0"),
        ("rollout.groups", 0, "whole number of at least 1"),
        ("rollout.slots", 129, "must not exceed the 128 episodes"),
        ("algo.mini_batches", 129, "must not exceed the 128 episodes"),
        ("train.rows_policy_tokens", 256, "so that a turn fits in a row"),
        ("model.num_kv_heads", 3, "must be a multiple of"),
        ("model.head_dim", 63, "must be even"),
        ("model.num_layers", 0, "at least 1"),
        ("model.vocab_size", 256, "at least 300"),
        ("agent.response_tokens", 16384, "must be below"),
        ("train.rows_tokens", 1024, "so that an episode fits in a row"),
        ("warm_start.episodes", 5, "warm_start.steps must be positive"),
        ("eval.splits", ("valid",), "eval.splits names 'valid'"),
        ("eval.also_temperatures", (1.0, -1.0), "different numbers, each zero or positive"),
        ("eval.also_temperatures", (1.0, 1.0), "different numbers, each zero or positive"),
        ("eval.also_temperatures", ("hot",), "different numbers, each zero or positive"),
        ("eval.also_temperatures", (1.0, 0.4), "contains config.eval.temperature.*leave it out"),
        ("env.max_receptacles", 0, "at least 1"),
        ("optim.lr", 0.0, "must be positive"),
        ("seed", -1, "seed=-1"),
    ],
)
def test_impossible_values_are_refused_in_one_sentence(key, value, message):
    config = base_config()
    section, _, leaf = key.rpartition(".")
    (config[section] if section else config)[leaf] = value
    with pytest.raises(UserError, match=message) as refusal:
        validate(config)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_kind": "full", "kl_place": "reward"}, "choose an estimate"),
        ({"kl_controller": "adaptive", "kl_coef": 0.0}, "kl_coef=0 must be positive"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(values, message):
    config = base_config()
    config.algo.update(values)
    with pytest.raises(UserError, match=message) as refusal:
        validate(config)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


def test_group_of_one_suits_an_algorithm_with_a_critic():
    config = base_config()
    config.algo.name = "ppo"
    config.rollout.update(groups=128, group_size=1)
    validate(config)


@pytest.mark.parametrize("env", [*ENVIRONMENTS, "own"])
def test_every_key_is_declared_once(env):
    keys = [setting.key for setting in settings_of(env)]
    assert len(keys) == len(set(keys)) and set(keys) == flatten(base_config(env)).keys()


def test_an_environment_of_ones_own_brings_its_keys():
    config = base_config("guess", workers=1, size=3)
    assert config.env.to_dict() == {"name": "guess", "workers": 1, "max_turns": 50, "size": 3}
    assert config.epo.alpha == 0.05 and config.agent.history_actions is False
    validate(config)


def test_every_key_is_read():
    """An option that nothing reads would deceive whoever sets it."""
    sources = [path for path in (ROOT / "epo_jax").rglob("*.py") if path.parent.name not in ("settings", "configs")]
    text = "\n".join(path.read_text() for path in sources)
    attributes = set(re.findall(r"\b(\w+)(?=\.(\w+))", text))
    names = set(re.findall(r"[\"']([\w{}]+)[\"']", text))
    names |= set(re.findall(r"^    (\w+): (?:int|float|bool|str)\b", text, re.MULTILINE))  # model and optim are read by field
    unread = []
    for setting in SETTINGS:
        section, _, leaf = setting.key.rpartition(".")
        leaf = re.sub(r"^(train|valid_seen|valid_unseen)_", "{split}_", leaf)  # as in f"{split}_games"
        owners = (section or "config", "config", "settings", "evaluation", "kept")
        if field := setting.traced or setting.static:
            read = any((owner, field) in attributes for owner in ("hyper", "self", "objective", "settings"))
        else:
            read = leaf in names or any((owner, leaf) in attributes for owner in owners)
        unread += [] if read else [setting.key]
    assert not unread


def test_coefficients_and_choices_have_the_defaults_of_the_config():
    objective, hyper = objective_and_hyper(base_config())
    assert hyper == tuple(map(np.float32, Hyper())) and hyper._fields == Hyper._fields
    for field, value in dataclasses.asdict(Choices()).items():
        assert getattr(objective, field) == value, field
    # Names that two sections share.
    config = base_config()
    config.algo.update(gamma=0.9, aggregation="seq-mean-token-sum")
    objective, hyper = objective_and_hyper(config)
    assert (hyper.discount, hyper.gamma) == (np.float32(0.9), 3.0)
    assert (objective.aggregation, objective.entropy_aggregation) == ("seq-mean-token-sum", "trajectory")


def test_coefficients_are_numbers_that_a_resumed_run_may_change():
    for setting in SETTINGS:
        if setting.traced:
            assert isinstance(setting.default, (int, float)) and setting.resume == "recorded", setting.key


def test_the_objectives_know_every_choice():
    choices = {setting.key: setting.choices for setting in SETTINGS if setting.choices}
    one, index = jax.ShapeDtypeStruct((1, 2), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    history = jax.eval_shape(lambda: entropy.init_history(3))

    def shape(function, *arguments):
        return jax.eval_shape(function, *arguments).shape

    known = {
        "epo.history": lambda mode: shape(lambda h: entropy.center(h, mode).value, history),
        "epo.penalty": lambda kind: shape(lambda x, y: entropy.corridor_penalty(x, y, 0.5, 2.0, kind), one, one),
        "epo.phase": lambda kind: shape(lambda: entropy.phase_weight(kind, 1, 4)),
        "algo.kl_kind": lambda kind: shape(lambda x, y: policy.kl_estimate(x, y, kind), one, one),
        "algo.aggregation": lambda mode: shape(lambda x, i: policy.token_weights(x, i, i, 1, 1, mode), one, index),
    }  # fmt: skip
    for key, function in known.items():
        for choice in choices[key]:
            if choice != "full":  # test_full_kl_takes_the_place_of_the_estimate
                assert function(choice) in ((), (1,), (1, 2)), choice
        with pytest.raises(Exception):  # noqa: B017  of the checked annotations, or of a branch that is not there
            function("another")
    assert choices["epo.aggregation"] == choices["algo.aggregation"]
    for scope in choices["epo.scope"]:
        if scope != "batch":
            assert shape(lambda x, i, scope=scope: policy.scope_mean(x, x, i, i, 1, 1, scope), one, index) == (1, 2)
