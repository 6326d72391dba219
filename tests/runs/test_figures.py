"""Figures are drawn from a run folder alone, also from a run that has barely begun."""

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from epo_jax.common.errors import UserError
from epo_jax.figures import main
from epo_jax.runs.figures import _smooth, draw
from epo_jax.runs.metrics import MetricWriter, evaluation_row
from tests.plays import outcomes


def steps(count):
    for step in range(count):
        low, high = (None, None) if step == 0 else (0.3, 0.9)
        yield {"step": step, "success": 0.5, "entropy": 0.6, "corridor_low": low, "corridor_high": high}


def test_figures_of_a_run(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for row in steps(5):
            writer.train(row)
        for split in ("valid_seen", "valid_unseen"):
            for step, won in ((0, False), (5, True)):
                writer.evaluation(evaluation_row(step, split, outcomes([("pick", won)] * 4)))
    paths = draw(tmp_path)
    assert [path.name for path in paths] == ["success.png", "entropy.png"]
    for path in paths:
        image = imread(path)
        assert image.shape[1] >= 1000, "legible at the width of a page"
        assert image[..., :3].std() > 0.03, "not blank"


@pytest.mark.parametrize("fill", ["one step", "evaluation only", "entropy not finite"])
def test_figures_of_a_run_that_has_barely_begun(tmp_path, fill):
    with MetricWriter(tmp_path) as writer:
        if fill == "one step":
            writer.train(next(steps(1)))
        elif fill == "evaluation only":
            writer.evaluation(evaluation_row(0, "valid_seen", outcomes([("pick", False)])))
        else:
            writer.train(next(steps(1)) | {"entropy": float("inf")})
    assert all(path.exists() for path in draw(tmp_path))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="name the folder of a run"):
        main(["figures", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_smoothing_never_looks_ahead():
    assert _smooth([0.0, 1.0, 1.0, 0.0], 2) == [0.0, 0.5, 1.0, 0.5]


def test_titles_name_game_model_and_seed_and_both_figures_end_at_the_last_step(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    (tmp_path / "config.json").write_text(
        '{"seed": 4, "env": {"name": "alfworld"}, "algo": {"name": "grpo"}, "model": {"path": "org/model"}}'
    )
    with MetricWriter(tmp_path) as writer:
        for row in steps(5):
            writer.train(row)
        writer.evaluation(evaluation_row(5, "valid_seen", outcomes([("pick", True)] * 4)))
    draw(tmp_path)
    for figure in drawn:
        assert figure.get_suptitle() == "ALFWorld · org/model · grpo · seed 4"
        assert figure.axes[0].get_xlim() == pytest.approx((-0.1, 5.1)), "five steps, although rows end at step 4"
    assert len(drawn) == 2
