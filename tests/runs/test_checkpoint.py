"""Checkpoints: what comes back is what went in, and what cannot be read is said in a sentence."""

import functools
import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from epo_jax.common.errors import UserError
from epo_jax.models.decoder import DecoderConfig, init_params, param_axes
from epo_jax.objectives.spec import ObjectiveConfig
from epo_jax.parallel import mesh
from epo_jax.runs import checkpoint, versions
from epo_jax.training.optim import OptimConfig
from epo_jax.training.state import LearnerConfig, abstract_state_on, init_state, init_state_on, state_shardings

MODEL = DecoderConfig(31, 16, 2, 2, 1, 8, 16)
OPTIM = OptimConfig(1e-3, 10)


def make_state(seed, critic=True):
    config = LearnerConfig(MODEL, ObjectiveConfig(), OPTIM, OPTIM if critic else None, critic, 1, 1, 5, 1.0)
    state = init_state(config, init_params(MODEL, jax.random.key(seed)))
    return state._replace(step=jnp.int32(3), history=state.history._replace(count=jnp.int32(2)))


def test_a_reader_warns_of_nothing(tmp_path, caplog):
    with checkpoint.open_manager(checkpoint.place(tmp_path), keep=2) as manager:
        checkpoint.save(manager, make_state(0))
    with caplog.at_level(logging.WARNING), checkpoint.open_reader(checkpoint.place(tmp_path)) as reader:
        assert reader.latest_step() == 3
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("critic", [True, False])
def test_a_restored_state_is_bit_identical(tmp_path, critic):
    state, progress = make_state(0, critic), checkpoint.Progress(1 / 3, 0.7, 2)
    with checkpoint.open_manager(checkpoint.place(tmp_path), keep=2) as manager:
        checkpoint.save(manager, state, progress)
        manager.wait_until_finished()
        restored, found = checkpoint.restore(manager, make_state(1, critic))
    assert found == progress
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, state, restored)


def test_only_the_newest_are_kept(tmp_path):
    with checkpoint.open_manager(checkpoint.place(tmp_path), keep=2) as manager:
        for step in (1, 2, 3):
            checkpoint.save(manager, make_state(0)._replace(step=jnp.int32(step)))
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 3]


def test_the_best_is_kept_besides(tmp_path):
    with checkpoint.open_manager(checkpoint.place(tmp_path), keep=1, keep_best=1) as manager:
        for step, success in enumerate((0.1, 0.5, checkpoint.NOT_EVALUATED, 0.4, checkpoint.NOT_EVALUATED)):
            checkpoint.save(manager, make_state(0)._replace(step=jnp.int32(step)), success=success)
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 4]


def test_a_state_goes_to_a_mesh_of_another_shape(tmp_path):
    model = DecoderConfig(40, 16, 1, 8, 4, 4, 32)
    config = LearnerConfig(model, ObjectiveConfig(), OPTIM, None, False, 1, 1, 5, 1.0)
    on = mesh.make_mesh(1, 8, 1)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    state = init_state_on(config, jax.device_put(params, mesh.shardings(on, params, param_axes(config.model))), on)
    with checkpoint.open_manager(checkpoint.place(tmp_path), keep=2) as manager:
        checkpoint.save(manager, state)
        manager.wait_until_finished()
        for shape in ((2, 2, 2), (1, 1, 1)):
            other = mesh.make_mesh(*shape)
            restored, _ = checkpoint.restore(manager, abstract_state_on(config, other))
            jax.tree.map(np.testing.assert_array_equal, state, restored)
            places = state_shardings(config, other)
            assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored, places))


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path):
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(3, args=ocp.args.StandardSave(make_state(0)))
    with checkpoint.open_reader(checkpoint.place(tmp_path)) as manager:
        with pytest.raises(UserError, match="checkpoints/3 was written by an earlier version"):
            checkpoint.restore(manager, make_state(0))


def test_a_bucket_that_cannot_be_reached_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"checkpoint.folder=gs://bucket/run.*pip install 'etils\[epath-gcs\]'"):
        checkpoint.place("run", "gs://bucket/run")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(24, "Too many open files"), r"Too many open files\); raise the limit on open files \(ulimit -n"),
        (PermissionError(13, "Permission denied"), r"Permission denied\); give this user the permission"),
        (OSError(116, "Stale file handle"), r"Stale file handle\); check that the file system or the network answers"),
        (ValueError("UNAVAILABLE: HTTP response code: 503"), r"503\); check that the file system or the network"),
        (MemoryError(), r"\(MemoryError\); free memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3 bytes"), "RESOURCE_EXHAUSTED.*free memory"),
        (KeyError("embedding"), r"KeyError: 'embedding'\); if it is damaged, put a copy back, or move it out of .*checkpoints"),
    ],
)
def test_a_restore_that_fails_names_the_true_error_and_keeps_the_traceback(tmp_path, monkeypatch, error, told):
    def failing(*_, **__):
        try:
            raise error
        except Exception as inner:  # as Orbax does
            raise ValueError("Failed to restore item `state`") from inner

    with checkpoint.open_manager(checkpoint.place(tmp_path), keep=2) as manager:
        checkpoint.save(manager, make_state(0))
        manager.wait_until_finished()
        monkeypatch.setattr(manager, "restore", failing)
        with pytest.raises(UserError, match=told) as refusal:
            checkpoint.restore(manager, make_state(0))
    sentence = str(refusal.value)
    assert "\n" not in sentence and "delete" not in sentence and f"traceback in {tmp_path}/errors.log" in sentence
    log = (tmp_path / "errors.log").read_text()
    assert "in failing" in log and type(error).__name__ in log


def test_a_state_of_another_shape_is_named(tmp_path):
    """The array, both shapes; and what the config needs but the checkpoint lacks."""
    with checkpoint.open_manager(checkpoint.place(tmp_path), keep=2) as manager:
        checkpoint.save(manager, make_state(0, critic=False))
        manager.wait_until_finished()
        other = make_state(0, critic=False)
        longer = other.history._replace(values=jnp.zeros((9, 1)))
        with pytest.raises(UserError, match=r"history.values is of shape \[5, 1\], but this config needs .* \[9, 1\]"):
            checkpoint.restore(manager, other._replace(history=longer))
        with pytest.raises(UserError, match=r"critic.decoder.embedding is missing"):
            checkpoint.restore(manager, make_state(0, critic=True))


def test_a_field_that_an_earlier_version_did_not_have_is_filled_in(tmp_path, monkeypatch):
    state = make_state(0)
    with checkpoint.open_manager(checkpoint.place(tmp_path), keep=2) as manager:
        checkpoint.save(manager, state._replace(kl_scale={}))
        manager.wait_until_finished()
        with pytest.raises(UserError, match="kl_scale is missing"):
            checkpoint.restore(manager, state)
        monkeypatch.setitem(versions.STATE_ADDED, "kl_scale", lambda like: jnp.full(like.shape, 3.0, like.dtype))
        restored, _ = checkpoint.restore(manager, state)
    assert restored.kl_scale == 3.0
    jax.tree.map(np.testing.assert_array_equal, state.params, restored.params)


def test_no_checkpoint_and_a_torn_one_are_refused(tmp_path):
    with checkpoint.open_manager(checkpoint.place(tmp_path), keep=2) as manager:
        with pytest.raises(UserError, match="holds no checkpoint"):
            checkpoint.restore(manager, make_state(0))
        checkpoint.save(manager, make_state(0))
        manager.wait_until_finished()
    for path in (tmp_path / "checkpoints" / "3").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    for opened in (functools.partial(checkpoint.open_manager, keep=2), checkpoint.open_reader):
        with pytest.raises(UserError, match=r"checkpoints/3 cannot be read"):
            opened(checkpoint.place(tmp_path))


def test_a_checkpoint_without_its_arrays_is_refused(tmp_path):
    with checkpoint.open_manager(checkpoint.place(tmp_path), keep=2) as manager:
        checkpoint.save(manager, make_state(0))
        manager.wait_until_finished()
    for path in (tmp_path / "checkpoints" / "3" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with checkpoint.open_reader(checkpoint.place(tmp_path)) as manager:
        with pytest.raises(UserError, match=r"checkpoints/3 cannot be read"):
            checkpoint.restore(manager, make_state(0))
