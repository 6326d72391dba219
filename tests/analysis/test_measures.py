"""The measures of a run, against rows whose numbers were worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from epo_jax.analysis import measures


def rows(**columns):
    """metrics.jsonl rows of steps 0, 1, ... with these columns."""
    return [
        {"step": k, **dict(zip(columns, values, strict=True))} for k, values in enumerate(zip(*columns.values(), strict=True))
    ]


def evaluation(step, success, **more):
    return {"step": step, "success": success, **more}


def test_the_best_evaluation_is_the_earliest_of_the_highest_and_not_that_of_the_initial_policy():
    found = measures.best_success([evaluation(0, 0.9), evaluation(10, 0.5), evaluation(20, 0.7), evaluation(30, 0.7)])
    assert found["step"] == 20
    assert measures.best_success([evaluation(0, 0.9)]) is None


def test_evaluations_from_a_step():
    given = [evaluation(step, 0.0) for step in (0, 20, 40, 60)]
    assert [row["step"] for row in measures.evaluations_from(given, 40)] == [40, 60]
    assert [row["step"] for row in measures.evaluations_from(given, None)] == [60]
    assert measures.evaluations_from(given, 61) == []


def test_steps_to_a_share_count_the_steps_taken():
    given = rows(success=[k / 20 for k in range(20)])
    assert measures.steps_to(given, 0.67) == 19  # the ten steps 9 to 18 have the mean 13.5 / 20, those before less
    assert measures.steps_to(given, 0.7, window=1) == 15
    assert measures.steps_to(given, 0.8) is None
    # A run that goes on from step 40 of another one: rows begin at 40.
    assert measures.steps_to([{**row, "step": row["step"] + 40} for row in given], 0.67) == 59


def test_last_success_is_that_of_ten_steps():
    assert measures.last_success(rows(success=[1.0] * 5 + [0.0] * 5 + [0.4] * 5)) == pytest.approx(0.2)
    assert measures.last_success(rows(success=[0.5, 1.0])) == pytest.approx(0.75)
    assert measures.last_success([{"step": 0}]) is None


def test_entropy_relative_to_the_first_step():
    given = rows(entropy=[0.2, 0.3, None, 0.1])
    assert measures.entropy_ratios(given) == [(0, 1.0), (1, pytest.approx(1.5)), (3, pytest.approx(0.5))]
    assert measures.entropy_ratios(rows(entropy=[0.0, 0.3])) == []


def test_roughness_and_the_spread_of_changes():
    """Changes +2, -1, +3 of entropies with mean 2.5: absolute mean 2; deviations 2/3, -7/3, 5/3 from their mean 4/3."""
    values = [1.0, 3.0, 2.0, 5.0]
    assert measures.roughness(values) == pytest.approx(2.0 / 2.75)
    assert measures.change_std(values) == pytest.approx(math.sqrt((4 + 49 + 25) / 27))
    rise = [0.1 * k for k in range(20)]
    assert measures.change_std(rise) == pytest.approx(0.0, abs=1e-12) and measures.roughness(rise) > 0.1
    assert measures.roughness([1.0]) is None and measures.change_std([1.0]) is None


def test_variance_around_the_trend_ignores_a_rise():
    assert measures.trend_variance([0.3 + 0.02 * k for k in range(40)]) == pytest.approx(0.0, abs=1e-12)
    assert measures.trend_variance([1.0] * 10) is None
    # One step of height 11 among zeros: it is 10 above the mean of its window; each of the ten around it 1 below.
    spike = [0.0] * 15 + [11.0] + [0.0] * 15
    assert measures.trend_variance(spike) == pytest.approx((100 + 10) / (31 - 10))
    noise = np.random.default_rng(0).normal(size=20_000)
    assert measures.trend_variance(noise.tolist()) == pytest.approx(10 / 11, rel=0.05)


def test_means_over_the_later_half():
    given = rows(entropy=[9.0, 9.0, 1.0, 3.0], entropy_first_turns=[9.0, 9.0, None, 3.0])
    assert measures.later_mean(given, "entropy") == 2.0 and measures.later_variance(given, "entropy") == 1.0
    assert measures.later_mean(given, "entropy_first_turns") == 6.0 and measures.later_mean(given, "other") is None


def test_deviation_from_the_corridor_is_summed_over_both_edges():
    given = rows(entropy=[5.0, 0.3, 1.0, 2.5], corridor_low=[None, 0.5, 0.5, 0.5], corridor_high=[None, 2.0, 2.0, 2.0])
    assert measures.corridor_deviation(given) == pytest.approx(0.2 + 0.0 + 0.5)
    assert measures.corridor_deviation(rows(entropy=[1.0])) is None


def test_a_collapse_of_entropy_is_the_first_step_above_five_times_the_first():
    assert measures.collapse_of_entropy(rows(entropy=[0.1, 0.5, 0.51, 0.2, 0.9])) == 2
    assert measures.collapse_of_entropy(rows(entropy=[0.1, 0.5])) is None


@pytest.mark.parametrize(
    ("success", "step"),
    [
        ([0.2, 0.8, 0.39, 0.1, 0.1, 0.1, 0.1, 0.9], 6),
        ([0.2, 0.8, 0.39, 0.1, 0.1, 0.1, 0.4, 0.1], None),  # four in a row; at exactly half it is not below
        ([0.2, 0.8, 0.3, 0.3, 0.3, 0.3], None),
        ([0.0] * 10, None),
        ([0.8, 0.3, 0.3, None, 0.3, 0.3, 0.3], 6),  # a step without episodes counts for nothing
    ],
)
def test_a_collapse_of_success_is_five_steps_below_half_of_the_best_so_far(success, step):
    assert measures.collapse_of_success(rows(success=success)) == step


def test_every_measure_is_none_for_a_run_without_its_metrics():
    assert {measure.key: measure.of([{"step": 0}]) for measure in measures.MEASURES} == dict.fromkeys(
        measure.key for measure in measures.MEASURES
    )


def test_a_collapse_of_success_is_chance_where_few_episodes_are_won():
    """As docs/metrics.md warns: policies that do not change, 128 episodes a step."""
    rng = np.random.default_rng(0)

    def share(success):
        runs = [rows(success=(rng.binomial(128, success, size=80) / 128).tolist()) for _ in range(200)]
        return sum(measures.collapse_of_success(run) is not None for run in runs) / len(runs)

    assert share(0.01) > 0.9 and 0.02 < share(0.1) < 0.2 and share(0.3) == 0


def test_every_measure_is_in_the_documents():
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text().partition("## In the report")[2]
    for measure in measures.MEASURES:
        assert measure.title in text, measure.title
