"""Benchmarks are run by hand; what they need of the package must be there when somebody does."""

import runpy
from pathlib import Path

import pytest

from benchmarks import checkpoint

BENCHMARKS = sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_can_be_loaded(path):
    if path.stem == "rollout_tunix":
        pytest.importorskip("tunix", reason="google-tunix is not installed")
    module = runpy.run_path(str(path), run_name=path.stem)
    assert module["__doc__"]


def test_what_checkpoints_cost_is_measured(monkeypatch, capsys):
    """That it loads does not say that its calls still fit what they call."""
    monkeypatch.setattr("sys.argv", ["checkpoint", "--rounds=1", "--updates=1", "--rows=4"])
    checkpoint.main()
    assert "% of a step of" in capsys.readouterr().out
