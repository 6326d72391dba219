"""The command draws a run in its folder, and a comparison where it is told to."""

import pytest

from epo_jax.common.errors import UserError
from epo_jax.figures import main
from tests.test_report import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / f"{lam}-{seed}", seed, lam, 0.5 + lam) for lam in (0.1, 0.2) for seed in (0, 1)]


def test_a_run_is_drawn_in_its_folder(runs, capsys):
    main(["figures", str(runs[0])])
    printed = capsys.readouterr().out.split()
    assert printed == [str(runs[0] / "figures" / name) for name in ("success.png", "entropy.png")]


def test_a_comparison_is_one_picture(runs, tmp_path, capsys):
    out = tmp_path / "comparison.svg"
    (tmp_path / "empty").mkdir()
    main(["figures", *map(str, runs), str(tmp_path / "empty"), "--out", str(out), "--title", "Both", "--reference", "lam 0.2"])
    text, printed = out.read_text(), capsys.readouterr()
    for words in ("Both · seeds 0, 1", "lam 0.1", "lam 0.2", "difference from", "H_k / H_0"):
        assert words in text, words
    assert printed.out == f"wrote {out}\n" and "empty has no metrics.jsonl" in printed.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--panels", "OOD"], "--out is missing"),
        (["--out", "a.jpg"], r"--out=a.jpg must end in .png, .svg, .pdf"),
        (["--out", "a.png", "--panels", "entrpy"], "no panel 'entrpy' .*'entropy'"),
        (["--out", "a.png", "--reference", "x"], "--reference=x: no arm"),
        (["--out", "a.png", "--smooth", "0"], "--smooth"),
    ],
)
def test_what_cannot_be_drawn_is_refused(runs, tmp_path, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence) as refusal:
        main(["figures", str(runs[0]), *options])
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


def test_several_runs_need_a_picture_to_be_named(runs):
    with pytest.raises(UserError, match="--out is missing"):
        main(["figures", *map(str, runs)])


def test_help_lists_the_panels(capsys):
    with pytest.raises(SystemExit):
        main(["figures", "--help"])
    text = capsys.readouterr().out
    assert "OOD@1" in text and "scatter[:MEASURE]" in text and "--panels" in text
