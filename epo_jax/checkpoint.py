"""Checkpoints of a run, by Orbax: written in the background, committed by a rename, the newest and the best kept.

A checkpoint is `state`, the whole `TrainState`, and `progress`, what the host has to remember. Nothing else is needed for a
resumed run to be the uninterrupted one bit for bit: the random numbers of everything sampled, and which tasks an RL step plays,
are pure functions of `config.seed` and the number of RL steps done.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from epo_jax.errors import UserError
from epo_jax.models.decoder import Params
from epo_jax.train_state import TrainState

NOT_EVALUATED = -1.0  # below any success


class Progress(NamedTuple):
    """What a run has come to, beside its `TrainState`.

    Attributes:
        wall_seconds: that it took to come here, in all processes that had a part in it.
        best: the highest success evaluated so far.
        skipped: the last RL steps in a row that had no finite gradient.
    """

    wall_seconds: float = 0.0
    best: float = NOT_EVALUATED
    skipped: int = 0


def place(workdir: Path, folder: str = "") -> epath.Path:
    """The folder of a run's checkpoints: `folder`, which may be in a bucket (gs://), or without it `workdir/checkpoints`.

    Raises:
        UserError: this installation cannot reach a bucket.
    """
    where = epath.Path(folder or Path(workdir).absolute() / "checkpoints")
    try:
        where.exists()
    except ImportError as error:
        raise UserError(f"config.checkpoint.folder={folder}: {str(error).rstrip('.')}; pip install 'etils[epath-gcs]'.") from None
    return where


def refuse_used(where: epath.Path) -> None:
    """Raises UserError if there are checkpoints, among which a new run must not put its own."""
    if where.exists() and any(child.name.isdigit() for child in where.iterdir()):
        raise UserError(f"{where} already holds the checkpoints of a run; choose another config.checkpoint.folder.")


def open_manager(where: epath.Path, keep: int, keep_best: int = 0) -> ocp.CheckpointManager:
    """The manager that writes the checkpoints in `where`, named after the number of RL steps done.

    It keeps the newest `keep` and the `keep_best` of highest success (of equal ones the newer), and clears away what a kill
    left half written.

    Raises:
        UserError: a checkpoint is damaged.
    """

    def success(metrics) -> float:
        return metrics["success"]

    newest = checkpoint_managers.LatestN(keep)
    best = checkpoint_managers.BestN(get_metric_fn=success, n=keep_best, keep_checkpoints_without_metrics=False)
    policy = checkpoint_managers.AnyPreservationPolicy([newest, best])
    options = ocp.CheckpointManagerOptions(
        create=True, cleanup_tmp_directories=True, best_fn=success, preservation_policy=policy if keep_best else newest
    )
    return _manager(where, options)


def open_reader(where: epath.Path) -> ocp.CheckpointManager:
    """A manager that changes nothing, whether or not a run writes there at the time. Raises UserError as `open_manager`."""
    return _manager(where, ocp.CheckpointManagerOptions(read_only=True, create=False))


def steps(where: epath.Path) -> set[int]:
    """RL steps of the checkpoints in `where`, which need not be there. Raises UserError as `open_manager`."""
    if not where.exists():
        return set()
    with open_reader(where) as manager:
        return set(manager.all_steps())


def newest(where: epath.Path) -> int | None:
    """RL steps of the newest checkpoint, None where there is none yet. Raises UserError as `open_manager`."""
    return max(steps(where), default=None)


def _manager(where: epath.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    try:
        return ocp.CheckpointManager(where, item_names=("state", "progress"), options=options)
    except ValueError:  # it looks at the success of each
        for rank in sorted(where.glob("*/metrics/metrics")):
            if not rank.read_text().rstrip().endswith("}"):
                raise _unreadable(rank.parent.parent, f"{rank} is damaged") from None
        raise


BEGINNING = Progress()


def save(
    manager: ocp.CheckpointManager, state: TrainState, progress: Progress = BEGINNING, success: float = NOT_EVALUATED
) -> None:
    """Starts writing a checkpoint; returns once it is copied, before it is on disk (`manager.wait_until_finished`).

    Args:
        success: of its policy, by which it is ranked.
    """
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress._asdict()))
    manager.save(int(state.step), args=items, metrics={"success": success})


def restore(manager: ocp.CheckpointManager, like: TrainState, step: int | None = None) -> tuple[TrainState, Progress]:
    """The newest checkpoint (or that of `step`).

    Args:
        like: arrays, or abstract arrays, of the structure, shapes, types and placement that the state shall have. It may have
            been saved from a mesh of any other shape.

    Raises:
        UserError: there is none, or it cannot be read as a state of this config.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    found = _read(manager, step, state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
    return found["state"], Progress(**found["progress"])


def restore_fields(manager: ocp.CheckpointManager, like: dict[str, Params], step: int | None = None) -> dict[str, Params]:
    """Some fields of the `TrainState` alone, of the newest checkpoint or that of `step`.

    Args:
        like: for each wanted field, abstract arrays of its shapes, types and placement; without one, on the first device.

    Raises:
        UserError: as `restore`.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), like)
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    return _read(manager, step, state=ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True))["state"]


def _read(manager: ocp.CheckpointManager, step: int | None, **items):
    step = manager.latest_step() if step is None else step
    if step is None:
        raise UserError(f"{manager.directory} holds no checkpoint; let the run take its first step.")
    folder = manager.directory / str(step)
    if step not in manager.all_steps():
        held = ", ".join(map(str, sorted(manager.all_steps())))
        raise UserError(f"{folder} is not there; choose from the checkpoints of the steps {held}.")
    if (folder / "default").exists():
        raise UserError(f"{folder} was written by an earlier version, whose checkpoints are not read; begin a new run.")
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax raises many kinds; to the user they are one
        reason = str(error).strip().splitlines()
        raise _unreadable(folder, f"{type(error).__name__}: {reason[0][:200] if reason else 'no message'}") from error


def _unreadable(folder: epath.Path, reason: str) -> UserError:
    return UserError(f"The checkpoint {folder} cannot be read ({reason}); delete that folder to resume from an older one.")
