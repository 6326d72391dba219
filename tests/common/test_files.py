"""Files on a file system without room, and paths of people without a home."""

import json
import os
import resource
import subprocess
import sys

import pytest

from epo_jax.common import files
from epo_jax.common.errors import UserError, full_disk
from epo_jax.envs.alfworld import protocol as alfworld
from epo_jax.envs.scienceworld import protocol as scienceworld
from epo_jax.models import hub
from epo_jax.runs.metrics import MetricWriter, read_rows


def test_a_leading_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.expand_user("~/runs/first", "--workdir") == tmp_path / "runs" / "first"
    assert str(files.expand_user("runs/~first", "--workdir")) == "runs/~first"
    with pytest.raises(UserError, match="--workdir=~nosuchuser/runs: there is no home folder ~nosuchuser"):
        files.expand_user("~nosuchuser/runs", "--workdir")


@pytest.fixture
def bounded():
    """`bounded(size)`: no file grows beyond `size` bytes from then on, and what is written up to there is a short write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_row_without_room_leaves_no_part_of_itself(tmp_path, bounded):
    path = tmp_path / "rows.jsonl"
    files.append(path, "first\n")
    bounded(10)
    with pytest.raises(OSError, match="rows.jsonl") as refused:
        files.append(path, "second, longer than there is room\n")
    assert path.read_text() == "first\n"
    told = full_disk(refused.value)
    assert str(path) in told and "File too large" in told and "\n" not in told
    with pytest.raises(OSError, match="rows.jsonl"):
        files.write_atomically(path, "x" * 100)
    assert path.read_text() == "first\n" and os.listdir(tmp_path) == ["rows.jsonl"]
    bounded(1000)
    files.append(path, "third\n")
    assert path.read_text() == "first\nthird\n"


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    """A file system that takes seven bytes at a time."""

    class Slow:
        def __init__(self, file):
            self._file = file

        def write(self, data):
            return self._file.write(bytes(data[:7]))

        def __getattr__(self, name):
            return getattr(self._file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

    monkeypatch.setattr(files, "open", lambda *args, **kwargs: Slow(open(*args, **kwargs)), raising=False)
    for i in range(3):
        files.append(tmp_path / "rows", json.dumps({"step": i, "text": "ä" * i}) + "\n")
    assert read_rows(tmp_path / "rows") == [{"step": i, "text": "ä" * i} for i in range(3)]


def test_metrics_without_room_raise_and_keep_whole_rows(tmp_path, bounded):
    """TensorBoard's events too: no thread of theirs fails alone, with a traceback."""
    row = {"step": 0, "success": 0.5}
    with MetricWriter(tmp_path) as writer:
        writer.train(row)
        bounded((tmp_path / "metrics.jsonl").stat().st_size + 5)
        with pytest.raises(OSError) as refused:
            writer.train(row | {"step": 1})
        assert full_disk(refused.value)
        bounded(resource.RLIM_INFINITY)
    assert read_rows(tmp_path / "metrics.jsonl") == [row]


def test_a_full_disk_ends_a_command_in_one_sentence(tmp_path):
    program = (
        "import resource, sys\nfrom epo_jax.command import run\nfrom epo_jax.common.files import append\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3, 3))\n"
        f"sys.exit(run(lambda argv: append({str(tmp_path / 'rows')!r}, 'a row')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'rows'} cannot be written (File too large)")


def test_the_cache_of_somebody_without_a_home_is_asked_for(monkeypatch):
    monkeypatch.delenv("EPO_JAX_DATA", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as where the user has no entry
    for folder in (lambda: alfworld._cache({}), lambda: scienceworld._folder({}), files.cache_folder):
        with pytest.raises(UserError, match="set EPO_JAX_DATA to a folder"):
            folder()
    monkeypatch.setenv("EPO_JAX_DATA", "/data")
    assert str(alfworld._cache({})) == "/data/alfworld"


def test_an_unknown_home_is_named(monkeypatch):
    monkeypatch.setenv("EPO_JAX_DATA", "~nosuchuser/data")
    monkeypatch.setenv("ALFWORLD_DATA", "~nosuchuser/games")
    for call, option in (
        (files.cache_folder, "EPO_JAX_DATA"),
        (alfworld._real_data, "ALFWORLD_DATA"),
        (lambda: hub.resolve("~nosuchuser/model"), "config.model.path"),
        (lambda: alfworld._cache({"data_dir": "~nosuchuser"}), "config.env.data_dir"),
    ):
        with pytest.raises(UserError, match=f"{option}=~nosuchuser.*no home folder"):
            call()
