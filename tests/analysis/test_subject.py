"""What a page tells of its runs."""

import pytest

from epo_jax.analysis import subject
from epo_jax.analysis.read import Run

CONFIG = {
    "env.name": "alfworld", "env.max_turns": 8, "model.path": "", "model.num_layers": 3, "model.d_model": 128,
    "algo.name": "grpo", "train.steps": 80, "rollout.groups": 16, "rollout.group_size": 8, "warm_start.episodes": 100,
    "warm_start.steps": 1500,
}  # fmt: skip


def run(seed, minutes=1.0, processes=(), **changes):
    config = CONFIG | {"seed": seed} | {key.replace("__", "."): value for key, value in changes.items()}
    return Run("r", None, config, [{"step": 0, "wall_seconds": 60 * minutes}], [], [], list(processes))


@pytest.mark.parametrize(
    ("seeds", "text"),
    [([3], "seed 3"), ([0, 1], "seeds 0, 1"), ([2, 0, 1, 1], "seeds 0 to 2"), ([0, 1, 5], "seeds 0, 1, 5"), ([], "")],
)
def test_seeds(seeds, text):
    assert subject.seeds([run(seed) for seed in seeds]) == text


def test_what_runs_share_and_where_they_differ():
    cpu, gpu = (
        {"step": 0, "device": "1 x cpu", "arguments": "--config=a"},
        {"step": 9, "device": "1 x H100", "arguments": "--resume"},
    )
    runs = [run(0, 2.0, [cpu, gpu]), run(1, 12.5, [cpu], algo__name="ppo", init_from__run="runs/{seed}")]
    assert subject.subject(runs) == "ALFWorld, 8 turns · new model, 3 layers of width 128 · seeds 0, 1"
    facts = dict(subject.facts(runs))
    assert facts["Method"] == "grpo or ppo" and facts["RL"] == "80 RL steps of 16 tasks x 8 episodes"
    assert facts["Device"] == "1 x cpu or 1 x H100" and facts["Options"] == "--config=a"
    assert facts["Initial policy"] == "cloned from 100 expert episodes in 1500 updates or the policy of runs/{seed}"
    assert facts["Time"].startswith("2 to 12.5 minutes each")
    assert "Optimizer" not in facts, "the configs have no learning rate"
    assert dict(subject.facts(runs[:1]))["Time"] == "2 minutes"


def test_mini_batches_are_of_episodes_or_of_turns():
    by_episode = {"optim__lr": 5e-6, "algo__mini_batches": 8, "algo__mini_batch_turns": 64}
    for values, text in (
        (by_episode, "8 mini-batches"),
        (by_episode | {"algo__mini_batches_by": "turn"}, "mini-batches of 64 turns"),
    ):
        assert dict(subject.facts([run(0, **values)]))["Optimizer"] == f"learning rate 5e-06, {text}"


def test_many_differences_are_counted():
    facts = dict(subject.facts([run(0, algo__name=f"m{i}") for i in range(6)]))
    assert facts["Method"] == "m0 or m1 or m2 or m3 or 2 others"
