"""Checkpoints: what comes back is what went in, and what cannot be read is said in a sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax import checkpoint
from epo_jax.errors import UserError
from epo_jax.learner import LearnerConfig, OptimConfig, init_state
from epo_jax.models.decoder import DecoderConfig, init_params
from epo_jax.objectives.loss import ObjectiveConfig

MODEL = DecoderConfig(31, 16, 2, 2, 1, 8, 16)
OPTIM = OptimConfig(1e-3, 10)


def make_state(seed, critic=True):
    config = LearnerConfig(MODEL, ObjectiveConfig(), OPTIM, OPTIM if critic else None, critic, 1, 1, 5, 1.0)
    state = init_state(config, init_params(MODEL, jax.random.key(seed)))
    return state._replace(step=jnp.int32(3), history=state.history._replace(count=jnp.int32(2)))


@pytest.mark.parametrize("critic", [True, False])
def test_a_restored_state_is_bit_identical(tmp_path, critic):
    state = make_state(0, critic)
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        checkpoint.save(manager, state)
        manager.wait_until_finished()
        restored = checkpoint.restore(manager, make_state(1, critic))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, state, restored)


def test_only_the_newest_are_kept(tmp_path):
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        for step in (1, 2, 3):
            checkpoint.save(manager, make_state(0)._replace(step=jnp.int32(step)))
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 3]


def test_no_checkpoint_and_a_torn_one_are_refused(tmp_path):
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        with pytest.raises(UserError, match="holds no checkpoint"):
            checkpoint.restore(manager, make_state(0))
        checkpoint.save(manager, make_state(0))
        manager.wait_until_finished()
    for path in (tmp_path / "checkpoints" / "3").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        with pytest.raises(UserError, match=r"checkpoints/3 cannot be read"):
            checkpoint.restore(manager, make_state(0))
