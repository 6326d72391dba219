"""Checkpoints of the whole TrainState, by Orbax: written in the background, committed by a rename, the newest N kept."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from epo_jax.errors import UserError
from epo_jax.learner import TrainState
from epo_jax.models.decoder import Params


def open_manager(workdir: Path, keep: int) -> ocp.CheckpointManager:
    """The manager of `workdir/checkpoints`; a checkpoint is named after the number of RL steps done."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager((Path(workdir) / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState) -> None:
    """Starts writing `state`; returns once it is copied, before it is on disk (`manager.wait_until_finished`)."""
    manager.save(int(state.step), args=ocp.args.StandardSave(state))


def restore(manager: ocp.CheckpointManager, like: TrainState, step: int | None = None) -> TrainState:
    """The newest checkpoint (or that of `step`), with the structure, shapes and placement of `like`.

    Raises:
        UserError: there is none, or it cannot be read as a state of this config.
    """
    step = manager.latest_step() if step is None else step
    if step is None:
        raise UserError(f"{manager.directory} holds no checkpoint to resume from; leave --resume out to start anew.")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return _read(manager, step, ocp.args.StandardRestore(abstract))


def restore_fields(manager: ocp.CheckpointManager, like: dict[str, Params], step: int | None = None) -> dict[str, Params]:
    """Some fields of the `TrainState` alone, of the newest checkpoint or that of `step`, on the first device.

    Args:
        like: for each wanted field, arrays or abstract arrays of its shapes and types.

    Raises:
        UserError: as `restore`.
    """
    step = manager.latest_step() if step is None else step
    if step is None:
        raise UserError(f"{manager.directory} holds no checkpoint; let the run take its first step.")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like)
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    return _read(manager, step, ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True))


def _read(manager: ocp.CheckpointManager, step: int, arguments):
    try:
        return manager.restore(step, args=arguments)
    except Exception as error:  # Orbax raises many kinds; to the user they are one
        reason = str(error).strip().splitlines()
        raise UserError(
            f"The checkpoint {manager.directory / str(step)} cannot be read ({type(error).__name__}: "
            f"{reason[0][:200] if reason else 'no message'}); delete that folder to resume from an older one."
        ) from error
