"""The sample of episodes that a run keeps: what a row says, how many there are, how large the file becomes."""

import json

import pytest

from epo_jax.models.tokenizer import train_tokenizer
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.runs.metrics import read_rows
from epo_jax.runs.trajectory_log import TrajectoryLog, pieces, spread, thin

TOKENIZER = train_tokenizer(["go to fridge 1", "take apple 1"] * 4, 300)


def played(kind: str, answers=("go to fridge 1", "take apple 1"), won=True) -> Trajectory:
    trajectory = Trajectory(task={"id": f"{kind}-7", "type": kind}, goal="take an apple", observations=["a room"], won=won)
    for number, answer in enumerate(answers):
        trajectory.append_prompt(TOKENIZER.first("a room"))
        ids = TOKENIZER.answer(answer)
        trajectory.append_answer(ids, [-0.5] * len(ids), [0.1 * i + number for i in range(len(ids))])
        trajectory.actions.append(answer)
        trajectory.valid.append(True)
        trajectory.rewards.append(float(number))
        trajectory.observations.append(f"after {answer}")
    return trajectory


def log(folder, step=0, episodes=6, megabytes=1.0):
    return TrajectoryLog(folder, step, TOKENIZER, episodes, megabytes)


def rows(folder):
    return read_rows(folder / "trajectories.jsonl")


def test_a_row_tells_the_episode(tmp_path):
    log(tmp_path).write(40, "valid_unseen", [played("pick")])
    (row,) = rows(tmp_path)
    assert (row["step"], row["split"], row["task"], row["type"]) == (40, "valid_unseen", "pick-7", "pick")
    assert (row["goal"], row["won"], row["end"]) == ("take an apple", True, "after take apple 1")
    assert [turn["observation"] for turn in row["turns"]] == ["a room", "after go to fridge 1"]
    assert ["".join(turn["tokens"]) for turn in row["turns"]] == ["go to fridge 1<|end|>", "take apple 1<|end|>"]
    assert [turn["reward"] for turn in row["turns"]] == [0.0, 1.0]
    for number, turn in enumerate(row["turns"]):
        assert len(turn["tokens"]) == len(turn["entropy"]) > 1
        assert turn["entropy"] == pytest.approx([0.1 * i + number for i in range(len(turn["entropy"]))])


def test_characters_of_several_tokens_are_not_torn():
    ids = TOKENIZER.answer("a 🍎é.")
    assert len(ids) >= 9, "the bytes of both are tokens of their own"
    told = pieces(ids, TOKENIZER)
    assert len(told) == len(ids) and "".join(told) == "a 🍎é.<|end|>"
    assert pieces([TOKENIZER.stop_id, *ids], TOKENIZER) == ["<|end|>", *told]
    beyond = TOKENIZER.vocab_size + 7  # a model may have more rows than its tokenizer has tokens
    assert pieces([beyond, *ids], TOKENIZER) == [f"<|{beyond}|>", *told]
    assert "🍎" in told and told[told.index("🍎") - 1] == ""


def test_bytes_that_never_become_a_character_are_told_as_such():
    broken = TOKENIZER.encode("🍎")[:2]
    told = pieces([*broken, TOKENIZER.stop_id], TOKENIZER)
    assert len(told) == 3 and "".join(told).endswith("<|end|>") and "\ufffd" in "".join(told)


def test_every_type_of_task_is_sampled_alike():
    types = ["a"] * 10 + ["b"] * 2 + ["c"] * 5
    assert spread(types, 3) == [0, 10, 12]
    assert sorted(types[i] for i in spread(types, 7)) == list("aaabbcc")
    assert spread(types, 99) == list(range(17)) and spread(types, 0) == []


def test_no_episodes_no_file(tmp_path):
    log(tmp_path, episodes=0).write(0, "train", [played("pick")])
    assert list(tmp_path.iterdir()) == []


def test_the_file_stays_within_its_bound_and_spread_over_the_run(tmp_path):
    one = len(json.dumps(rows_of_one(tmp_path / "one"))) + 1
    bound = 20.5 * one / 1e6
    (tmp_path / "run").mkdir()
    kept = log(tmp_path / "run", episodes=1, megabytes=bound)
    for step in range(0, 1000, 10):
        kept.write(step, "train", [played("pick")])
        assert (tmp_path / "run" / "trajectories.jsonl").stat().st_size <= 1e6 * bound
    steps = [row["step"] for row in rows(tmp_path / "run")]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 990 and len(steps) >= 8
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) <= 330


def rows_of_one(folder):
    folder.mkdir()
    log(folder).write(100, "train", [played("pick")])
    return rows(folder)[0]


def test_thinning_ends_even_where_the_first_and_last_step_are_too_much():
    lines = [json.dumps({"step": step, "text": "x" * 100}) + "\n" for step in (0, 0, 1, 9, 9)]
    assert thin(lines, 300) == [lines[0], lines[1]]
    assert thin(lines, 10) == []


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    first = log(tmp_path, episodes=1)
    for step, split in ((0, "valid_seen"), (0, "train"), (4, "valid_seen"), (4, "train"), (8, "valid_seen")):
        first.write(step, split, [played("pick")])
    with open(tmp_path / "trajectories.jsonl", "a") as file:
        file.write('{"step": 9, "spl')
    log(tmp_path, step=4)
    assert [(row["step"], row["split"]) for row in rows(tmp_path)] == [(0, "valid_seen"), (0, "train"), (4, "valid_seen")]
    log(tmp_path, step=0)
    assert rows(tmp_path) == []
