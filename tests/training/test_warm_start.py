"""What the warm start clones: episodes that exist, were won and fit. Without any, a run ends before it writes."""

import dataclasses

import pytest

from epo_jax import main as program
from epo_jax.common.errors import UserError
from epo_jax.envs import toy
from epo_jax.training.initial_policy import expert_demonstrations, expert_trajectories, own_tokenizer
from tests.toy_sweep import get_config

SOUND = toy.demonstrations


def lose(tasks, options, every=1):
    """Every n-th expert names the wrong number."""
    shown = SOUND(tasks, options)
    return [fail(d) if i % every == 0 else d for i, d in enumerate(shown)]


def fail(demonstration):
    *seen, last = demonstration.observations
    return dataclasses.replace(demonstration, observations=(*seen, dataclasses.replace(last, won=False)))


@pytest.mark.parametrize(
    ("experts", "option", "message"),
    [
        (lambda *_: [], "warm_start.episodes=4", "warm_start.episodes=4: .* 4 do not exist .*raise config.env.max_turns or"),
        (lose, "warm_start.episodes=4", "warm_start.episodes=4: .* 4 are lost; .* set config.warm_start.lost=True"),
        (SOUND, "agent.max_tokens=20", "config.agent.max_tokens=20: none of the 30 .* the shortest needs 29 tokens"),
    ],
)
def test_a_run_with_nothing_to_clone_is_refused_before_anything_is_written(tmp_path, monkeypatch, experts, option, message):
    monkeypatch.setattr(toy, "demonstrations", experts)
    with pytest.raises(UserError, match=message) as refusal:
        program.main(["main", "--config=tests/toy_sweep.py:single", f"--workdir={tmp_path / 'run'}", f"--config.{option}"])
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


def test_lost_episodes_are_cloned_only_where_that_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(toy, "demonstrations", lambda *a: lose(*a, every=3)[:-2])
    config, tasks = get_config("single"), toy.list_tasks("train", {})
    assert all(d.won for d in expert_demonstrations(config, tasks)) and "lost" in capsys.readouterr().out
    config.warm_start.lost = True
    shown = expert_demonstrations(config, tasks)
    assert len(shown) == 28 and sum(not d.won for d in shown) == 10
    assert "of 30 expert episodes, 2 do not exist within config.env.max_turns=2 turns and 10 are lost" in capsys.readouterr().out


def test_episodes_that_no_policy_has_room_for_are_left_out_and_counted(capsys):
    config, tasks = get_config("single"), toy.list_tasks("train", {})
    shown = expert_demonstrations(config, tasks)
    long = dataclasses.replace(shown[0], actions=("word " * 60, *shown[0].actions[1:]))
    tokenizer = own_tokenizer(config, shown)
    kept = expert_trajectories(config, tokenizer, [long, *shown])
    assert len(kept) == 30 and max(t.longest_context for t in kept) <= config.agent.max_tokens
    assert "warm start on 30 expert episodes" in (said := capsys.readouterr().out) and "; 1 do not fit" in said
