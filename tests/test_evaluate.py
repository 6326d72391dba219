"""Evaluation plays a fixed split whole, in a run and as a command."""

import json
import shutil

import jax
import numpy as np
import pytest

from epo_jax import evaluate as command
from epo_jax.common.errors import UserError
from epo_jax.envs import toy
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models import weights
from epo_jax.models.decoder import DecoderConfig, decoder_config, init_params
from epo_jax.models.tokenizer import train_tokenizer
from epo_jax.parallel import mesh
from epo_jax.rollout.prompts import RolloutConfig, SamplingConfig, rollout_config
from epo_jax.runs import checkpoint
from epo_jax.runs.folder import read_config, write_config
from epo_jax.runs.metrics import wilson
from epo_jax.runs.policies import Policy, load
from epo_jax.training.evaluation import Evaluation, evaluate
from epo_jax.training.from_config import learner_config, objective_and_hyper
from epo_jax.training.state import init_state
from tests import toy_sweep
from tests.processes import Processes

TOKENIZER = train_tokenizer([toy.GOAL, "you see a red door. the number is 3."], 400)
MODEL = DecoderConfig(TOKENIZER.vocab_size, 16, 1, 2, 1, 8, 16)
SETTINGS = RolloutConfig(slots=4, max_turns=2, max_tokens=160, max_policy_tokens=64, response_tokens=5, style="bare")


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


def run(params, tasks, seed=0, samples=1):
    with EnvPool("toy", {}, 1) as pool:
        policy = Policy(TOKENIZER, MODEL, params, None, 5)
        return evaluate(Evaluation("valid_seen"), tasks, policy, pool, SETTINGS, SamplingConfig(0.4), seed, samples)


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


def test_the_first_play_of_a_game_is_the_one_of_a_single_evaluation(params):
    tasks = toy.list_tasks("valid_seen", {})[:3]
    row, played = run(params, tasks, samples=3)
    assert [t.task for t in played] == [task for task in tasks for _ in range(3)]
    assert [t.actions for t in played[::3]] == [t.actions for t in run(params, tasks)[1]]
    assert any(len({tuple(t.tokens) for t in played[i : i + 3]}) > 1 for i in (0, 3, 6))
    assert (row["episodes"], set(row["pass_at"])) == (9, {1, 2, 3})
    assert row["turns"] == sum(len(t.actions) for t in played) / 9
    turns = [valid for t in played for valid in t.valid]
    assert row["invalid_actions"] == pytest.approx(1 - sum(turns) / len(turns))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run folder with the checkpoints of steps 0 and 3, and a model folder with the policy of step 3."""
    runs, published = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("model")
    config = toy_sweep.get_config()
    del config.sweep
    config.model.update(vocab_size=TOKENIZER.vocab_size)
    write_config(config, runs)
    model = decoder_config(config.model)
    objective, _ = objective_and_hyper(config)
    state = init_state(learner_config(config, model, objective), init_params(model, jax.random.key(0)))
    stirred = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), state.params)
    with checkpoint.open_manager(checkpoint.place(runs), 2) as manager:
        checkpoint.save(manager, state)
        manager.wait_until_finished()
        checkpoint.save(manager, state._replace(step=state.step + 3, params=stirred))
    weights.save_params(published, model, stirred)
    for folder in (runs, published):
        TOKENIZER.save(folder / "tokenizer" if folder is runs else folder)
    return runs, published, config, model, state.params, stirred


def scores(tmp_path, *arguments):
    command.main(["evaluate", *map(str, arguments), f"--out={tmp_path / 'scores.json'}"])
    return json.loads((tmp_path / "scores.json").read_text())


def without_seconds(row):
    return {name: value for name, value in row.items() if name != "seconds"}


def test_a_run_folder_is_played_as_the_run_itself_would(folders, tmp_path, capsys):
    runs, _, config, model, first, last = folders
    found = scores(tmp_path, f"--checkpoint={runs}")
    assert (found["step"], found["temperature"], found["samples"]) == (3, config.eval.temperature, 1)
    with EnvPool("toy", {}, 1) as pool:
        tasks = toy.list_tasks("valid_seen", {})
        policy = Policy(TOKENIZER, model, last, None, 3)
        want, _ = evaluate(Evaluation("valid_seen"), tasks, policy, pool, rollout_config(config), SamplingConfig(0.4), 0)
    assert [without_seconds(row) for row in found["splits"]] == [json.loads(json.dumps(without_seconds(want)))]
    assert "valid_seen after 3 RL steps" in capsys.readouterr().out
    older = load(str(runs), 0, config, mesh.make_mesh(1, 2, 1))
    assert older.step == 0 and older.params["embedding"].sharding.mesh.size == 2
    jax.tree.map(np.testing.assert_array_equal, older.params, first)


def test_the_further_temperatures_of_a_run_are_played_unless_one_is_given(folders, tmp_path):
    runs, more = folders[0], tmp_path / "more"
    shutil.copytree(runs, more)
    config = read_config(runs)
    config.eval.also_temperatures = (0.0,)
    write_config(config, more)
    greedy, usual = scores(tmp_path, f"--checkpoint={more}")["splits"]
    (alone,), (zero,) = (scores(tmp_path, f"--checkpoint={runs}", *given)["splits"] for given in ([], ["--temperature=0"]))
    assert without_seconds(usual) == without_seconds(alone)
    assert without_seconds(greedy) == without_seconds(zero) | {"temperature": 0.0} != without_seconds(usual)
    found = scores(tmp_path, f"--checkpoint={more}", "--temperature=0", "--split=valid_seen", "--split=valid_seen")
    assert [without_seconds(row) for row in found["splits"]] == [without_seconds(zero)]


def test_a_run_that_sampled_on_more_devices_is_played_on_those_there_are(folders, tmp_path):
    runs, more = folders[0], tmp_path / "more"
    shutil.copytree(runs, more)
    config = read_config(runs)
    config.rollout.devices = 9
    write_config(config, more)
    options = "--temperature=0", "--split=valid_unseen"
    (row,), (want,) = (scores(tmp_path, f"--checkpoint={folder}", *options)["splits"] for folder in (more, runs))
    assert without_seconds(row) == without_seconds(want)


def test_a_model_folder_is_played_in_the_environment_of_a_config(folders, tmp_path, capsys):
    """Greedy: the same episodes as the run's checkpoint, all plays of a game alike."""
    runs, published, *_ = folders
    options = "--temperature=0", "--samples=2", "--split=valid_unseen"
    found = scores(tmp_path, f"--checkpoint={published}", "--config=tests/toy_sweep.py", "--config.rollout.slots=4", *options)
    assert (found["step"], found["splits"][0]["split"]) == (None, "valid_unseen")
    (row,) = found["splits"]
    assert row["pass_at"]["1"] == row["pass_at"]["2"] == row["success"]
    assert "valid_unseen\n" in capsys.readouterr().out
    (same,) = scores(tmp_path, f"--checkpoint={runs}", *options)["splits"]
    assert without_seconds(row) == without_seconds(same) | {"step": None}


def test_two_processes_find_what_one_does(folders, tmp_path):
    runs, out = folders[0], tmp_path / "two.json"
    options = f"--checkpoint={runs}", "--temperature=0"
    with Processes(2, tmp_path, "-m", "epo_jax.evaluate", *options, f"--out={out}") as running:
        assert running.codes(120) == [0, 0], running.said(0)[-2000:] + running.said(1)[-2000:]
        assert "valid_seen after 3 RL steps" in running.said(0) and f"wrote {out}" in running.said(0)
        assert "valid_seen" not in running.said(1) and "wrote" not in running.said(1)
    two, one = json.loads(out.read_text()), scores(tmp_path, *options)
    assert [without_seconds(row) for row in two["splits"]] == [without_seconds(row) for row in one["splits"]]


@pytest.mark.parametrize(
    ("which", "arguments", "culprit"),
    [
        (1, [], "--config is missing.*is no run folder"),
        (1, ["--config=tests/toy_sweep.py", "--step=3"], "--step=3.*is no run folder"),
        (0, ["--step=7"], "checkpoints of the steps 0, 3"),
        (0, ["--split=test"], "'test'"),
        (0, ["--samples=0"], "a whole number of at least 1"),
        (0, ["--temperature=-1"], "temperature"),
        (0, ["--seed=4294967296"], "--seed: 4294967296 must be a whole number from 0 to 4294967295"),
        (1, ["--config=tests/toy_sweep.py:single", "--config.rollout.devices=9"], "config.rollout.devices=9 is more than"),
        (0, ["--config.seed=1"], "--config must be given"),
        (0, ["--stepp=3"], "stepp"),
        (0, ["--processes=2"], "--coordinator is missing"),
        (0, ["--out=/no/such/folder/scores.json"], "/no/such/folder"),
    ],
)
def test_bad_input_is_told_in_a_sentence(folders, which, arguments, culprit):
    with pytest.raises(UserError, match=culprit) as refusal:
        command.main(["evaluate", f"--checkpoint={folders[which]}", *arguments])
    assert "\n" not in str(refusal.value)
