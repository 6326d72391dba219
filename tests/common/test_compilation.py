"""Compiled programs on disk: who compiles, whose settings come first, a folder that is safe and bounded."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import pytest

from epo_jax import evaluate, generate, main, sweep
from epo_jax.common import compilation

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import collections, sys
import jax, jax.numpy as jnp
from epo_jax.common import compilation
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
compilation.keep_programs()
x = jnp.linspace(0, 1, 64).reshape(8, 8)
total = jax.jit(lambda x: jnp.sin(x @ x).sum())(x)
print(events["cache_hits"], events["cache_misses"], total.hex() if hasattr(total, "hex") else float(total).hex())
"""


def command(home: Path, **variables: str) -> tuple[int, int, str, str]:
    """(programs read from the cache, programs written to it, result, standard error) of a new process."""
    without = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "EPO_"))}
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "EPO_JAX_DATA": str(home)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **variables}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=without | environment, capture_output=True, text=True, check=True)
    hits, misses, total = ran.stdout.split()
    return int(hits), int(misses), total, ran.stderr


def kept(home: Path) -> list[Path]:
    return sorted(home.rglob("*-cache"))


def test_programs_are_kept_between_processes(tmp_path):
    """A second process compiles nothing and computes the same; damaged files are replaced; other devices need other programs."""
    hits, misses, total, _ = command(tmp_path)
    assert hits == 0 < misses == len(kept(tmp_path))
    assert command(tmp_path) == (misses, 0, total, "")
    assert {path.parent.parent for path in kept(tmp_path)} == {tmp_path / "compiled"}
    assert {path.parent.stat().st_mode & 0o777 for path in kept(tmp_path)} == {0o700}
    for path in kept(tmp_path):
        path.write_bytes(path.read_bytes()[:-20])
    assert command(tmp_path) == (0, misses, total, "")
    assert command(tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2")[:2] == (0, misses)
    assert len(kept(tmp_path)) == 2 * misses


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """JAX without a cache, and a cache folder of the test's own."""
    names = "jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs"
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.setenv("EPO_JAX_DATA", str(tmp_path / "data"))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "data"
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("name", "value"), [("enable_compilation_cache", False), ("compilation_cache_dir", ""), ("compilation_cache_dir", "/else")]
)
def test_the_variables_of_jax_come_first(unset, name, value):
    jax.config.update(f"jax_{name}", value)
    compilation.keep_programs()
    assert jax.config.jax_compilation_cache_dir == (value if name == "compilation_cache_dir" else None)
    assert not unset.exists()


def test_several_processes_keep_none_of_their_own(unset, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    compilation.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None and not unset.exists()


@pytest.mark.parametrize("reason", ["a file", "others may write"])
def test_a_folder_that_cannot_be_used_is_named_and_left_alone(unset, capsys, reason):
    folder = unset / "compiled" / f"{os.getuid()}-{compilation.cpu_kind()}"
    if reason == "a file":
        unset.mkdir()
        folder.parent.write_text("")
    else:
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    compilation.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("compiled programs are not kept (") and str(folder.parent) in err


def test_without_a_home_folder_nothing_is_kept(unset, monkeypatch, capsys):
    monkeypatch.setenv("EPO_JAX_DATA", "~nosuchuser/data")
    compilation.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None and "~nosuchuser" in capsys.readouterr().err


def test_the_least_recently_used_programs_are_deleted(tmp_path):
    for name, used in (("old", 1), ("read", 2), ("new", 3)):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(zlib.compress(os.urandom(89)))
        assert path.stat().st_size == 100
        os.utime(path, (used, 0))
    (tmp_path / "xla_gpu_per_fusion_autotune_cache_dir").mkdir()
    os.utime(tmp_path / "old-cache", (4, 0))
    compilation.trim(tmp_path, 300)
    assert len(kept(tmp_path)) == 3
    compilation.trim(tmp_path, 250)
    assert [path.name for path in kept(tmp_path)] == ["new-cache", "old-cache"]
    compilation.trim(tmp_path, 99)
    assert kept(tmp_path) == [] and len(list(tmp_path.iterdir())) == 2


def test_damaged_programs_are_deleted_and_sound_ones_are_read_once(tmp_path, monkeypatch):
    sound, cut, empty = (tmp_path / f"{name}-cache" for name in ("sound", "cut", "empty"))
    sound.write_bytes(zlib.compress(b"program"))
    cut.write_bytes(sound.read_bytes()[:-1])
    empty.write_bytes(b"")
    compilation.trim(tmp_path)
    assert kept(tmp_path) == [sound]
    os.utime(sound, (0, 0))
    monkeypatch.setattr(compilation, "_complete", lambda content: pytest.fail("read again"))
    compilation.trim(tmp_path)


class Called(Exception):
    pass


@pytest.mark.parametrize("program", ["main", "sweep", "evaluate", "generate"])
def test_every_command_that_computes_keeps_its_programs(monkeypatch, tmp_path, program):
    def called():
        raise Called

    monkeypatch.setattr(compilation, "keep_programs", called)
    presets = {"main": "configs/scienceworld.py:laptop", "sweep": "configs/ablation.py:laptop"}
    arguments = {
        "evaluate": [f"--checkpoint={tmp_path}", f"--config={ROOT}/configs/scienceworld.py:laptop"],
        "generate": [f"--checkpoint={tmp_path}", "--prompt=x"],
    }
    fallback = [f"--config={ROOT}/{presets.get(program)}", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(Called):
        {"main": main, "sweep": sweep, "evaluate": evaluate, "generate": generate}[program].main(
            [program, *arguments.get(program, fallback)]
        )
