"""Results of arms from hand-made runs."""

import pytest

from epo_jax.analysis import intervals, results
from epo_jax.analysis.arms import Arm
from epo_jax.analysis.columns import Column
from epo_jax.analysis.read import IID, OOD, Run


def evaluation(step, won, episodes=20, split=OOD, **more):
    return {"step": step, "split": split, "won": won, "episodes": episodes, "success": won / episodes, **more}


def run(seed, evaluations=(), entropy=(), success=None):
    metrics = [{"step": k, "entropy": value, "success": success} for k, value in enumerate(entropy)]
    return Run(f"run{seed}", None, {"seed": seed, "eval.temperature": 0.4}, metrics, list(evaluations))


def test_success_of_the_last_evaluation_and_of_the_best():
    """Best: 16/20 and 6/20, not the 18/20 of an initial policy. Last: 10/20 and 6/20."""
    arm = Arm(
        "a", [run(0, [evaluation(0, 18), evaluation(10, 16), evaluation(20, 10)]), run(1, [evaluation(20, 6), evaluation(10, 2)])]
    )
    found = results.success(arm, Column(OOD), None)
    assert found["mean"] == pytest.approx(0.4) and found["values"] == [0.5, 0.3] and found["counts"] == [(10, 20), (6, 20)]
    assert found["best"]["mean"] == pytest.approx(0.55) and found["best_values"] == [0.8, 0.3]
    assert (found["low"], found["high"]) == intervals.of_success([0.5, 0.3], [20, 20])[1:]
    assert results.success(arm, Column(OOD), 10)["values"] == [pytest.approx(0.65), pytest.approx(0.2)]
    assert results.success(arm, Column(IID), None) is None and results.success(arm, Column(OOD), 99) is None


def test_each_temperature_has_its_own_success():
    given = [run(0, [evaluation(5, 4), evaluation(5, 8, temperature=1.0), evaluation(6, 5), evaluation(5, 1, split=IID)])]
    assert results.success(Arm("a", given), Column(OOD), None)["values"] == [0.25]
    assert results.success(Arm("a", given), Column(OOD, 1.0), None)["values"] == [0.4]
    assert results.value_of(given[0], f"{OOD}@1", None) == 0.4


def test_arms_are_compared_by_seed():
    arm = Arm(
        "a", [run(seed, [evaluation(5, won)], [0.1, ratio]) for seed, won, ratio in ((0, 10, 0.3), (1, 12, 0.2), (5, 1, 0.1))]
    )
    base = Arm("b", [run(seed, [evaluation(5, won)], [0.2, 0.2]) for seed, won in ((1, 6), (0, 8))])
    found = results.versus(arm, base, [Column(OOD)], None)["differences"]
    assert found[OOD]["seeds"] == [0, 1] and found[OOD]["values"] == pytest.approx([0.1, 0.3])
    assert found[OOD]["mean"] == pytest.approx(0.2) and found["highest_ratio"]["values"] == pytest.approx([2.0, 1.0])
    assert f"best {OOD}" in found and "roughness" in found and "corridor_deviation" not in found


def test_collapses_are_counted_and_compared():
    arm = Arm("a", [run(seed, entropy=[0.1, 0.2, 0.6, 0.9]) for seed in range(5)])
    base = Arm("b", [run(seed, entropy=[0.1, 0.2, 0.3]) for seed in range(5)])
    assert results.collapses(arm) == {"entropy": [2] * 5, "success": [None] * 5}
    assert results.versus(arm, base, [], None)["p"] == {"entropy": pytest.approx(2 / 252), "success": pytest.approx(1.0)}


def test_measures_have_their_interval_over_runs():
    arm = Arm("a", [run(seed, entropy=[0.1, 0.1 * last], success=0.0) for seed, last in ((0, 1), (1, 2), (2, 3))])
    found = results.measures(arm)
    assert (
        found["last_ratio"]["values"] == pytest.approx([1, 2, 3])
        and found["last_ratio"]["low"] < 1 < 3 < found["last_ratio"]["high"]
    )
    assert found["entropy_first_turns"] == {"values": [None] * 3, "mean": None, "low": None, "high": None}
    assert found["train_success"]["mean"] == 0 and found["train_success"]["high"] is None, "how many episodes is not known"
    sized = [each._replace(config=each.config | {"rollout.groups": 4, "rollout.group_size": 2}) for each in arm.runs]
    assert results.training_episodes(sized[0]) == 16, "two steps of eight"
    assert 0 < results.measures(Arm("a", sized))["train_success"]["high"] < 0.5


def test_the_scatter_has_a_point_for_each_run_and_r():
    runs = [
        run(seed, [evaluation(5, won)], [0.1, entropy])
        for seed, won, entropy in ((0, 20, 0.1), (1, 15, 0.2), (2, 8, 0.3), (3, 2, 0.5))
    ]
    found = results.scatter([Arm("a", runs)], "highest_ratio", None)
    assert found["x"] == pytest.approx([1, 2, 3, 5]) and found["y"] == [1.0, 0.75, 0.4, 0.1] and found["runs"] == 4
    assert found["r"] == intervals.correlation(found["x"], found["y"])._asdict() and found["r"]["mean"] < -0.9
    assert results.scatter([Arm("a", runs[:2])], "highest_ratio", None)["r"] is None
    assert found["within"] is None, "there is one arm"
    more = [*runs, *runs]
    two = results.scatter([Arm("a", more[:3]), Arm("b", more[3:])], "highest_ratio", None)
    assert two["within"] == intervals.correlation(two["x"], two["y"], [0] * 3 + [1] * 5)._asdict()
    assert results.final_success(run(0, [], [0.1], success=0.5), None) == 0.5, "of training, if nothing was evaluated"
