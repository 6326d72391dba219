"""Figures of arms: what is drawn is what was measured, every arm is named, and nothing is cut off."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from epo_jax.analysis import figures, intervals
from epo_jax.analysis.arms import arms_of
from epo_jax.analysis.comparison import Comparison
from epo_jax.analysis.measures import roughness, series
from epo_jax.analysis.panels import panels_of
from epo_jax.analysis.read import OOD, Run
from epo_jax.common.errors import UserError
from tests.analysis.test_results import evaluation

STEPS = 10


def run(seed, lam, rise):
    metrics = [
        {"step": k, "success": 0.1 * k * rise, "entropy": 0.1 * (seed + 1) + rise * k, "corridor_low": 0.0, "corridor_high": 1.0}
        for k in range(STEPS)
    ]
    won = round(20 * rise)
    evaluations = [evaluation(0, 1), evaluation(STEPS, won), evaluation(STEPS, 2, temperature=1.0)]
    return Run(f"run{seed}", None, {"seed": seed, "epo.lam": lam, "eval.temperature": 0.4}, metrics, evaluations)


@pytest.fixture
def compared():
    arms = arms_of([run(seed, lam, rise) for lam, rise in ((0.1, 0.2), (0.2, 0.5), (0.3, 0.5)) for seed in range(3)])
    return Comparison(arms, arms[0], None, 1)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be saved."""
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: found.append(self))
    return found


def lines(axes, thick):
    return [line for line in axes.lines if (line.get_linewidth() > 1) == thick and line.get_marker() == "None"]


def test_curves_are_means_and_runs_over_all_steps(compared, drawn, tmp_path):
    figures.draw(compared, ["entropy", "success", "OOD"], "about", tmp_path / "a.png")
    entropy, success, evaluated = (part.axes[0] for part in drawn[0].subfigs)
    first = lines(entropy, thick=True)[0]
    np.testing.assert_allclose(first.get_ydata(), [0.2 + 0.2 * k for k in range(STEPS)])
    assert len(lines(entropy, thick=False)) == 9 and len(lines(entropy, thick=True)) == 3
    band = entropy.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(intervals.of_mean([0.1, 0.2, 0.3]).low)
    assert {axes.get_xlim() for axes in (entropy, success, evaluated)} == {(0, STEPS)}, "training ends where evaluation does"
    assert list(lines(evaluated, thick=True)[1].get_ydata()) == pytest.approx([0.05, 0.5])


def test_the_mean_of_steps_never_looks_ahead(compared, drawn, tmp_path):
    figures.draw(compared._replace(smooth=2), ["entropy"], "about", tmp_path / "a.png")
    np.testing.assert_allclose(lines(drawn[0].subfigs[0].axes[0], True)[0].get_ydata()[:3], [0.2, 0.3, 0.5])
    assert "means of 2 steps" in drawn[0].subfigs[0].axes[0].get_xlabel()


def test_every_arm_is_named_at_its_line_and_no_name_covers_another(compared, drawn, tmp_path):
    """Two of the three arms are the same numbers."""
    figures.draw(compared, ["OOD"], "about", tmp_path / "a.png")
    texts = drawn[0].subfigs[0].axes[0].texts
    boxes = [text.get_window_extent() for text in texts]
    assert sorted(text.get_text() for text in texts) == ["lam 0.1", "lam 0.2", "lam 0.3"]
    extents = sorted((box.y0, box.y1) for box in boxes)
    assert all(below[1] <= above[0] + 1 for below, above in zip(extents, extents[1:], strict=False)), extents
    assert all(0 <= box.x0 and box.x1 <= drawn[0].bbox.width for box in boxes)


def test_differences_are_from_the_reference_by_seed(compared, drawn, tmp_path):
    figures.draw(compared, ["differences", "differences:highest_ratio"], "about", tmp_path / "a.png")
    success, ratio = (part.axes[0] for part in drawn[0].subfigs)
    assert [label.get_text() for label in success.get_yticklabels()] == ["lam 0.2", "lam 0.3"]
    dots = [line.get_xdata() for line in success.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots, [[0.3] * 3] * 2)
    dots = [line.get_xdata() for line in ratio.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots, [[0.3 * 9 / h for h in (0.1, 0.2, 0.3)]] * 2)


def test_the_end_and_the_scatter(compared, drawn, tmp_path):
    figures.draw(compared, ["final", "final:OOD@1", "scatter:roughness"], "about", tmp_path / "a.png")
    final, hot, scatter = (part.axes[0] for part in drawn[0].subfigs)
    bars = [line.get_xdata() for line in final.lines if line.get_linewidth() == 1.6]
    np.testing.assert_allclose(bars[1], intervals.of_success([0.5] * 3, [20] * 3)[1:])
    assert [line.get_xdata()[0] for line in hot.lines if line.get_marker() == "|"] == pytest.approx([0.1] * 3)
    title = drawn[0].subfigs[2].get_suptitle()
    values = [(roughness(series(each.metrics, "entropy")), each.evaluated(OOD)[-1]["success"]) for each in compared.runs]
    r = intervals.correlation(*zip(*values, strict=True))
    assert title == f"Final success against roughness\n9 runs, r = {r.mean:.2f} [{r.low:.2f}, {r.high:.2f}]"
    assert sum(len(line.get_xdata()) for line in scatter.lines) == 9


def test_a_measure_by_a_setting(drawn, tmp_path):
    """Two methods at two values of lam, and one of them at a third."""
    runs = [
        (each := run(seed, lam, rise))._replace(config=each.config | {"algo.name": name})
        for name, lam, rise in (("a", 0.1, 0.2), ("a", 0.01, 0.4), ("b", 0.01, 0.3), ("b", 0.1, 0.5), ("a", 1.0, 0.1))
        for seed in range(3)
    ]
    arms = arms_of(runs)
    figures.draw(Comparison(arms, arms[0], None, 1), ["by:epo.lam", "by:epo.lam:last_ratio"], "about", tmp_path / "a.png")
    axes = drawn[0].subfigs[0].axes[0]
    first, second = (line for line in axes.lines if line.get_markersize() == 4)
    assert list(first.get_xdata()) == [0.01, 0.1, 1.0] and list(first.get_ydata()) == pytest.approx([0.4, 0.2, 0.1])
    assert list(second.get_xdata()) == [0.01, 0.1] and list(second.get_ydata()) == pytest.approx([0.3, 0.5])
    assert [text.get_text() for text in axes.texts] == ["a", "b"] and axes.get_xscale() == "log"
    assert drawn[0].subfigs[1].get_suptitle() == "last H_k / H_0"


def test_corridors_have_one_scale(compared, drawn, tmp_path):
    figures.draw(compared, ["corridor"], "about", tmp_path / "a.png")
    panels = [part.axes[0] for part in drawn[0].subfigs]
    assert len(panels) == 3 and len({axes.get_ylim() for axes in panels}) == 1
    assert [part.get_suptitle() for part in drawn[0].subfigs] == [f"Entropy and corridor, {arm.name}" for arm in compared.arms]


def test_long_titles_stay_in_the_picture(compared, drawn, tmp_path):
    about = "ALFWorld, 8 turns · new model, 0.71M parameters, 4 layers of width 128 · seeds 0 to 4"
    figures.draw(compared, ["differences:corridor_deviation"], about, tmp_path / "a.png")
    figure = drawn[0]
    for text in (figure._suptitle, figure.subfigs[0]._suptitle):
        box = text.get_window_extent()
        assert text.get_text()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, text


@pytest.mark.parametrize("suffix", figures.FORMATS)
def test_pictures_are_written_and_repeat_to_the_byte(compared, tmp_path, suffix):
    paths = [figures.draw(compared, ["OOD", "scatter"], "about", tmp_path / f"{name}{suffix}") for name in "ab"]
    first, second = (path.read_bytes() for path in paths)
    assert len(first) > 5000 and (suffix == ".pdf" or first == second)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("OD", "no panel 'OD' .*'OOD'"),
        ("OOD@hot", "no run has what the panel 'OOD@hot' shows"),
        ("IID", "no run has what the panel 'IID' shows"),
        ("kl", "no run has what the panel 'kl' shows"),
        ("scatter:rough", "no measure 'rough'"),
        ("final:change_st", "no measure 'change_st'"),
        ("differences:kl", "no measure 'kl'"),
        ("by:epo.kappa", "no run has what the panel 'by:epo.kappa:valid_unseen' shows"),
        ("differences:IID", "no measure 'valid_seen'"),
    ],
)
def test_a_panel_that_cannot_be_drawn_is_refused(compared, name, sentence):
    with pytest.raises(UserError, match=sentence):
        panels_of(compared, name)
