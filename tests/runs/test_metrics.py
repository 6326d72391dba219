"""Rows, intervals and console lines."""

import itertools
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from epo_jax.common.errors import UserError
from epo_jax.runs import wandb_log
from epo_jax.runs.metrics import (
    MetricWriter,
    Outcome,
    clock,
    evaluation_row,
    evaluation_table,
    gains,
    interval_of_plays,
    members_table,
    pass_at_k,
    progress_line,
    read_rows,
    seconds_left,
    wilson,
)
from tests.plays import outcomes


def row(step, **more):
    return {"step": step, "success": 0.5, "reward": 5.0, "entropy": 0.6} | more


@pytest.mark.parametrize(
    ("won", "episodes", "low", "high"),
    # From the closed form by hand; 81/263 is Newcombe's (1998) worked example.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)],
)
def test_wilson_known_values(won, episodes, low, high):
    assert wilson(won, episodes) == pytest.approx((low, high), abs=1e-4)


def test_wilson_of_nothing_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_holds_the_rate_and_mirrors():
    for episodes in (1, 7, 120):
        for won in range(episodes + 1):
            low, high = wilson(won, episodes)
            assert 0.0 <= low <= won / episodes <= high <= 1.0
            assert wilson(episodes - won, episodes) == pytest.approx((1 - high, 1 - low))


def test_one_row_per_step_in_plain_json(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.train(row(0, loss=np.float32(0.25), turns=np.arange(2), corridor_low=None))
        writer.train(row(1, loss=float("nan")))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert (first["loss"], first["turns"], first["corridor_low"]) == (0.25, [0, 1], None)
    assert second["loss"] is None
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_row_is_on_disk_at_once(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.train(row(0))
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1
    writer.close()


def test_resume_leaves_one_row_per_step(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(6):
            writer.train(row(step, reward=1.0))
            if step in (1, 3, 5):
                writer.evaluation(evaluation_row(step + 1, "valid_seen", outcomes([("pick", False)])))
    # Killed while it wrote step 6; the newest checkpoint holds four steps.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "succ')
    with MetricWriter(tmp_path, step=4) as writer:
        for step in range(4, 7):
            writer.train(row(step, reward=2.0))
        writer.evaluation(evaluation_row(6, "valid_seen", outcomes([("pick", True)])))
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [each["step"] for each in rows] == list(range(7))
    assert [each["reward"] for each in rows] == [1.0] * 4 + [2.0] * 3
    evaluations = read_rows(tmp_path / "eval.jsonl")
    assert [(each["step"], each["won"]) for each in evaluations] == [(2, 0), (4, 0), (6, 1)]
    superseded = read_rows(tmp_path / "metrics.superseded.jsonl"), read_rows(tmp_path / "eval.superseded.jsonl")
    assert [[each["step"] for each in rows] for rows in superseded] == [[4, 5], [6]]


def test_an_evaluation_made_again_replaces_the_first(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.evaluation(evaluation_row(0, "valid_seen", outcomes([("pick", False)])))
        writer.evaluation(evaluation_row(0, "valid_unseen", outcomes([("pick", False)])))
        writer.evaluation(evaluation_row(0, "valid_seen", outcomes([("pick", True)])))
    assert [(each["split"], each["won"]) for each in read_rows(tmp_path / "eval.jsonl")] == [
        ("valid_unseen", 0),
        ("valid_seen", 1),
    ]


def test_a_further_temperature_has_a_row_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    row = evaluation_row(3, "valid_seen", outcomes([("pick", False)]))
    with MetricWriter(tmp_path, 0, wandb_log.begin("agents", tmp_path, {})) as writer:
        for more in ({}, {"temperature": 1.0}, {"temperature": 0.25}, {"temperature": 1.0, "won": 5}):
            writer.evaluation(row | more)
    written = [(each.get("temperature"), each["won"]) for each in read_rows(tmp_path / "eval.jsonl")]
    assert written == [(None, 0), (0.25, 0), (1.0, 5)]
    _, first, second, third, _ = sys.modules["wandb"].runs[0].logged
    names = [{key for key in scalars if key.endswith(("won", "temperature"))} for scalars in (first, second, third)]
    assert names == [{f"eval/valid_seen/{name}"} for name in ("won", "temperature_1/won", "temperature_0.25/won")]
    assert evaluation_table(row | {"temperature": 0.25}).startswith("valid_seen at temperature 0.25 after 3 RL steps")
    assert members_table(["a"], [row | {"temperature": 1.0}]).startswith("  a  valid_seen at temperature 1 after 3 steps")


def test_both_rules_for_won_are_counted_where_there_are_two():
    rules = [("boil", True, True), ("boil", False, True), ("melt", False, False)]
    played = [Outcome(kind, str(i), won, 50.0, 4, 1, reference) for i, (kind, won, reference) in enumerate(rules)]
    row = evaluation_row(3, "valid_seen", played)
    assert (row["won"], row["won_reference"], row["episodes"]) == (1, 2, 3)
    by_type = {kind: (scores["won"], scores["won_reference"]) for kind, scores in row["by_type"].items()}
    assert by_type == {"boil": (1, 2), "melt": (0, 0)}
    assert evaluation_table(row).count("won by the reference rule") == 3
    assert "won_reference" not in evaluation_row(3, "valid_seen", outcomes([("pick", False)]))


def test_a_new_run_starts_from_no_rows(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.train(row(0))
    MetricWriter(tmp_path).close()
    assert read_rows(tmp_path / "metrics.jsonl") == []


class Wandb:
    """What is used of wandb: `init` gives runs that note what they are told."""

    def __init__(self, refusal=None):
        self.runs, self._refusal = [], refusal

    def init(self, id=None, **about):
        if self._refusal:
            raise self._refusal
        run = SimpleNamespace(id=id or f"id{len(self.runs)}", about=about, logged=[], ended=0)
        run.define_metric = lambda name, step_metric: run.logged.append((name, step_metric))
        run.log = run.logged.append
        run.finish = lambda: setattr(run, "ended", run.ended + 1)
        self.runs.append(run)
        return run


def test_weights_and_biases_gets_the_rows_and_evaluations(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    config = {"epo": {"lam": 0.1}}
    for first in (0, 1):
        with MetricWriter(tmp_path, first, wandb_log.begin("agents", tmp_path, config, "group")) as writer:
            writer.train(row(first, corridor_low=None))
            writer.evaluation(evaluation_row(first + 1, "valid_seen", outcomes([("pick", True)])))
    fresh, resumed = sys.modules["wandb"].runs
    assert fresh.id == resumed.id and fresh.ended == resumed.ended == 1
    assert (fresh.about["project"], fresh.about["config"], fresh.about["group"]) == ("agents", config, "group")
    steps, trained, evaluated = fresh.logged
    assert steps == ("*", "step")
    assert trained == {"step": 0, "train/success": 0.5, "train/reward": 5.0, "train/entropy": 0.6}
    assert (evaluated["step"], evaluated["eval/valid_seen/success"], evaluated["eval/valid_seen/turns"]) == (1, 1.0, 4.0)
    assert resumed.logged[1]["step"] == 1


def test_weights_and_biases_is_asked_only_where_a_project_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert wandb_log.begin("", tmp_path, {}) is None
    with pytest.raises(UserError, match="wandb_project='agents' needs the package wandb"):
        wandb_log.begin("agents", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    with pytest.raises(UserError, match="not installed"):
        wandb_log.begin("agents", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", Wandb(RuntimeError("no key\nfound")))
    with pytest.raises(UserError, match="no key found.*wandb login"):
        wandb_log.begin("agents", tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_evaluation_counts_per_type():
    won = [("look", True), ("pick", False), ("look", False), ("pick", False), ("look", True)]
    result = evaluation_row(20, "valid_unseen", outcomes(won))
    assert result["types"] == {"look": [2, 3], "pick": [0, 2]}
    assert (result["won"], result["episodes"], result["success"]) == (2, 5, 0.4)
    assert (result["low"], result["high"]) == wilson(2, 5)
    assert (result["score"], result["turns"], result["invalid_actions"]) == (50.0, 4.0, 0.25)
    assert result["by_type"]["look"]["success"] == pytest.approx(2 / 3) and "pass_at" not in result
    table = evaluation_table(result)
    assert "valid_unseen after 20 RL steps" in table
    assert [line.split()[:3] for line in table.splitlines()[1:]] == [
        ["look", "2/3", "66.7%"],
        ["pick", "0/2", "0.0%"],
        ["all", "2/5", "40.0%"],
    ]


def test_turns_without_an_action_are_counted_by_turn():
    """An episode of ten turns weighs ten times as much as an episode of one."""
    result = evaluation_row(0, "train", [Outcome("t", "a", True, 100.0, 10, 0), Outcome("t", "b", False, 0.0, 1, 1)])
    assert (result["turns"], result["invalid_actions"], result["score"]) == (5.5, 1 / 11, 50.0)


def test_pass_at_k_is_the_share_of_subsets_with_a_success():
    for won in range(7):
        plays = [True] * won + [False] * (6 - won)
        for k in range(1, 7):
            subsets = list(itertools.combinations(plays, k))
            assert pass_at_k(6, won, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_a_row_of_several_plays_tells_pass_at_k():
    won = {"a": (True, False, False), "b": (False, False, False)}
    played = [Outcome("t", game, each, 0.0, 2, 0) for game, plays in won.items() for each in plays]
    result = evaluation_row(None, "valid_seen", played)
    assert result["pass_at"] == pytest.approx({1: 1 / 6, 2: 1 / 3, 3: 1 / 2})
    assert result["pass_at"][1] == pytest.approx(result["success"]) and result["episodes"] == 6
    table = evaluation_table(result)
    assert table.startswith("valid_seen\n") and "pass@3 50.0%" in table


def test_the_interval_of_repeated_plays_holds_what_it_says():
    """Games of different difficulty, played four times each: the interval holds the true rate as often as it should; that of
    as many independent episodes would not. Where plays do not resemble each other, the two agree."""
    rng = np.random.default_rng(0)
    held = {"plays": 0, "episodes": 0}
    for _ in range(400):
        won = rng.binomial(4, rng.choice([0.05, 0.95], 40))
        for name, (low, high) in {"plays": interval_of_plays(won.tolist(), 4), "episodes": wilson(won.sum(), 160)}.items():
            held[name] += low <= 0.5 <= high
    assert 0.92 < held["plays"] / 400 < 0.98 and held["episodes"] / 400 < 0.8
    alike = [interval_of_plays(rng.binomial(4, 0.5, 40).tolist(), 4) for _ in range(400)]
    independent = wilson(80, 160)
    assert np.mean([high - low for low, high in alike]) < 1.15 * (independent[1] - independent[0])
    assert interval_of_plays([4] * 20, 4) == wilson(20, 20) and interval_of_plays([1, 0, 1], 1) == wilson(2, 3)


def test_progress_line_tells_the_step():
    full = row(11, corridor_low=0.3, corridor_high=0.9, tokens_per_second=1832.4, rollout_seconds=6.2, update_seconds=7)
    line = progress_line(full, 80, 913)
    for part in ("step 12/80", "50.0%", "5.00", "0.600 [0.300, 0.900]", "1832 tok/s", "6.2s", "7.0s", "left 15:13"):
        assert part in line, part
    start = progress_line(full | {"corridor_low": None, "entropy": None}, 80, math.nan)
    assert len(start) >= len(line) - 2 and "None" not in start


def test_time_left_ignores_the_compile():
    assert seconds_left([60.0, 10.0, 10.0, 11.0], 5) == seconds_left([60.0, 10.0], 5) == 50.0
    assert seconds_left([100.0] * 5 + [1.0] * 10, 3) == 3.0
    assert math.isnan(seconds_left([], 3)) and math.isnan(seconds_left([60.0], 3))


def test_clock():
    assert [clock(seconds) for seconds in (5, 75, 3725, math.nan)] == ["0:05", "1:15", "1:02:05", "-:--"]


def test_gains_are_the_first_and_the_last_evaluation_of_each_split_at_its_own_temperature():
    def row(split, step, won, **more):
        outcomes = [Outcome("pick", str(i), i < won, 0.0, 1, 0) for i in range(20)]
        return evaluation_row(step, split, outcomes) | more

    rows = [row("seen", 0, 2), row("unseen", 0, 4), row("seen", 5, 9), row("unseen", 9, 17), row("unseen", 9, 1, temperature=1.0)]
    assert gains(rows) == [
        "success on seen: 10 % [3, 30] after 0 RL steps, 45 % [26, 66] after 5 RL steps (20 episodes)",
        "success on unseen: 20 % [8, 42] after 0 RL steps, 85 % [64, 95] after 9 RL steps (20 episodes)",
    ]
    assert gains(rows[:1]) == ["success on seen: 10 % [3, 30] after 0 RL steps (20 episodes)"] and gains([]) == []
