"""Rows, intervals and console lines."""

import json
import math

import numpy as np
import pytest

from epo_jax.metrics import (
    MetricWriter,
    clock,
    evaluation_row,
    evaluation_table,
    progress_line,
    read_rows,
    seconds_left,
    wilson,
)


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
                writer.evaluation(evaluation_row(step + 1, "valid_seen", [("pick", False)]))
    # Killed while it wrote step 6; the newest checkpoint holds four steps.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "succ')
    with MetricWriter(tmp_path, step=4) as writer:
        for step in range(4, 7):
            writer.train(row(step, reward=2.0))
        writer.evaluation(evaluation_row(6, "valid_seen", [("pick", True)]))
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [each["step"] for each in rows] == list(range(7))
    assert [each["reward"] for each in rows] == [1.0] * 4 + [2.0] * 3
    evaluations = read_rows(tmp_path / "eval.jsonl")
    assert [(each["step"], each["won"]) for each in evaluations] == [(2, 0), (4, 0), (6, 1)]


def test_an_evaluation_made_again_replaces_the_first(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.evaluation(evaluation_row(0, "valid_seen", [("pick", False)]))
        writer.evaluation(evaluation_row(0, "valid_unseen", [("pick", False)]))
        writer.evaluation(evaluation_row(0, "valid_seen", [("pick", True)]))
    assert [(each["split"], each["won"]) for each in read_rows(tmp_path / "eval.jsonl")] == [
        ("valid_unseen", 0),
        ("valid_seen", 1),
    ]


def test_a_new_run_starts_from_no_rows(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.train(row(0))
    MetricWriter(tmp_path).close()
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_evaluation_counts_per_type():
    outcomes = [("look", True), ("pick", False), ("look", False), ("pick", False), ("look", True)]
    result = evaluation_row(20, "valid_unseen", outcomes)
    assert result["types"] == {"look": [2, 3], "pick": [0, 2]}
    assert (result["won"], result["episodes"], result["success"]) == (2, 5, 0.4)
    assert (result["low"], result["high"]) == wilson(2, 5)
    table = evaluation_table(result)
    assert "valid_unseen after 20 RL steps" in table
    assert [line.split()[:3] for line in table.splitlines()[1:]] == [
        ["look", "2/3", "66.7%"],
        ["pick", "0/2", "0.0%"],
        ["all", "2/5", "40.0%"],
    ]


def test_progress_line_tells_the_step():
    full = row(11, corridor_low=0.3, corridor_high=0.9, tokens_per_second=1832.4, rollout_seconds=6.2, update_seconds=7)
    line = progress_line(full, 80, 913)
    for part in ("step 12/80", "50.0%", "5.00", "0.600 [0.300, 0.900]", "1832 tok/s", "6.2s", "7.0s", "left 15:13"):
        assert part in line, part
    start = progress_line(full | {"corridor_low": None, "entropy": None}, 80, math.nan)
    assert len(start) >= len(line) - 2 and "None" not in start


def test_time_left_ignores_the_compile():
    assert seconds_left([60.0, 10.0, 10.0, 11.0], 5) == pytest.approx(52.5)
    assert seconds_left([100.0] * 5 + [1.0] * 10, 3) == 3.0
    assert math.isnan(seconds_left([], 3))


def test_clock():
    assert [clock(seconds) for seconds in (5, 75, 3725, math.nan)] == ["0:05", "1:15", "1:02:05", "-:--"]
