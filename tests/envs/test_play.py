"""The game on the terminal shows what a policy would read and plays what its parser makes of an answer."""

import os
import subprocess
import sys

import pytest

from epo_jax.command import run
from epo_jax.envs import agent, play, toy
from epo_jax.settings.config import base_config

TASK = toy.list_tasks("train", {})[4]  # a blue door with a 1


def test_a_person_plays_with_the_policys_messages(monkeypatch, capsys):
    lines = iter(["blue", "<think>I read it</think><action> 1 </ACTION>"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    play.main(["play", "--env=toy", f"--task={TASK['id']}"])
    said = capsys.readouterr().out
    env = toy.make_env({})
    assert agent.first_message(env.reset(TASK), "tagged") in said
    assert agent.next_message(env.step("blue"), "tagged") in said
    assert "=> 'blue'\n" in said and "=> '1'\n" in said
    assert "won after 2 turns, score 100" in said


def test_the_expert_plays_with_a_window(capsys):
    play.main(["play", "--env=toy", f"--task={TASK['id']}", "--expert", "--style=bare", "--window=1"])
    said = capsys.readouterr().out
    assert "you see a blue door.\n> blue\nthe number is 1.\n" in said and "won after 2 turns" in said


def test_a_window_names_older_actions_where_the_environments_config_does(monkeypatch, capsys):
    """As the paper's ScienceWorld prompt."""
    assert base_config("scienceworld").agent.history_actions
    config = base_config("toy")
    config.agent.history_actions = True
    monkeypatch.setattr(play, "base_config", lambda env: config)
    play.main(["play", "--env=toy", f"--task={TASK['id']}", "--expert", "--style=bare", "--window=0"])
    assert f"\n> blue\nthe number is 1.\n{toy.GOAL}\n" in capsys.readouterr().out


def test_what_cannot_be_read_is_played_and_marked(monkeypatch, capsys):
    lines = iter(["<think>", ""])

    def line(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", line)
    play.main(["play", "--env=toy"])
    said = capsys.readouterr().out
    assert said.count("(not a valid answer)") == 2 and "not won after 2 turns" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--env=nowhere"], "env.name='nowhere' is not an environment"),
        (["--env=toy", "--task=blue-99"], "--task='blue-99' is not in this split; the nearest is blue-9"),
        (["--env=scienceworld", "--option=simplicity=easy"], "--option='simplicity=easy' is not understood"),
        (["--env=alfworld", "--option=hints=all"], "env.hints='all' is not known"),
        (["--env=toy", "--split=test"], "argument --split: invalid choice: 'test'"),
    ],
)
def test_bad_input_is_told_in_a_sentence(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["play", *arguments])
    assert run(play.main) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_options_are_json_or_text():
    options = play.read_options("scienceworld", ['tasks=["boil"]', "simplification=", "hints=none", "max_turns=7"])
    assert (options["tasks"], options["simplification"], options["hints"], options["max_turns"]) == (["boil"], "", "none", 7)


def test_the_program_needs_no_jax():
    program = "import sys; from epo_jax.envs import play; print('jax' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True).stdout == "False\n"
