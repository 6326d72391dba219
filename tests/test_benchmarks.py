"""Benchmarks are run by hand; what they need of the package must be there when somebody does."""

import runpy
from pathlib import Path

import pytest

from benchmarks import checkpoint, decode, hosts
from epo_jax.command import parse
from epo_jax.runs import profiling

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


def test_hosts_passes_other_options_on(monkeypatch):
    """Those of the command line after its own, so that they win."""
    given = []

    class Refused(Exception):
        pass

    def processes(count, folder, *command):
        given.extend(command)
        raise Refused

    monkeypatch.setattr(hosts, "Processes", processes)
    options = ["--config.optim.lr=1e-4", "--config.env.workers=2"]
    monkeypatch.setattr("sys.argv", ["hosts", "--processes", "1", "--config=configs/alfworld.py:smoke", *options])
    with pytest.raises(Refused):
        hosts.main()
    assert given[2] == "--config=configs/alfworld.py:smoke" and given[-2:] == options
    assert parse(["main", *given[2:]], profiling.define_flag).config.optim.lr == 1e-4


def test_decode_is_held_against_its_bound(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["decode", "--layers=1", "--slots=2", "--context=32", "--block=4", "--width=8"])
    monkeypatch.setattr(decode, "rates", lambda dtype: (1e10, 1e11))
    decode.main()
    told = capsys.readouterr().out
    weights = 49152 * 576 + 576 * (2 * 576 + 2 * 192 + 3 * 1536) + 3 * 576  # embedding, projections, norms
    cache = 2 * 2 * 3 * 64 * 32
    assert f"memory {1e3 * 4 * (weights + cache) / 1e10:.2f} ms" in told and "prefill of 8 tokens a row" in told
