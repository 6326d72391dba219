"""Checkpoints of a run, by Orbax: written in the background, committed by a rename, the newest and the best kept.

A checkpoint is `state`, the `TrainState` without the frozen base of adapters, and `progress`, what the host has to remember.
Nothing else is needed for a resumed run to be the uninterrupted one bit for bit: the random numbers of everything sampled, and
which tasks an RL step plays, are pure functions of `config.seed` and the number of RL steps done.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from epo_jax.common.errors import UserError, explain, keep_traceback
from epo_jax.common.files import expand_user
from epo_jax.models.decoder import Params
from epo_jax.runs import versions

NOT_EVALUATED = -1.0  # below any success

State = Any  # `TrainState`, of which only the fields `step` and `base` matter here


class Progress(NamedTuple):
    """What the host has to remember, next to the `TrainState`.

    Attributes:
        wall_seconds: cumulative wall-clock seconds, including earlier (resumed) processes.
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
    if "://" not in folder:
        folder = expand_user(folder, "config.checkpoint.folder") if folder else Path(workdir) / "checkpoints"
        return epath.Path(folder.absolute())
    where = epath.Path(folder)
    try:
        where.exists()
    except ImportError as error:
        raise UserError(f"config.checkpoint.folder={folder}: {str(error).rstrip('.')}; pip install 'etils[epath-gcs]'.") from None
    except Exception as error:  # of the bucket's own library
        what, log = explain(error, "see that the bucket is there"), keep_traceback(error)
        raise UserError(f"config.checkpoint.folder={folder} cannot be read {what} (traceback in {log}).") from error
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


# Parts of what Orbax logs and nobody needs to read: tracebacks of errors in its threads, which the manager raises too, and that
# a reader only reads.
_EXPECTED = (
    "background save thread", "(save_finalize) failed", "_SignalingThread.run() raised", "Task exception was never retrieved",
    "Given directory is read only",
)  # fmt: skip


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in _EXPECTED)


def open_reader(where: epath.Path) -> ocp.CheckpointManager:
    """A manager that changes nothing, whether or not a run writes there at the time. Raises UserError as `open_manager`."""
    # Orbax warns of an interval between saves where nothing is saved.
    return _manager(where, ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0))


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
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_unexpected)
    try:
        return ocp.CheckpointManager(where, item_names=("state", "progress"), options=options)
    except Exception as error:  # Orbax raises many kinds; it reads the success of each checkpoint
        for rank in sorted(where.glob("*/metrics/metrics")):
            if not rank.read_text().rstrip().endswith("}"):
                raise _unreadable(where, rank.parent.parent, ValueError(f"{rank} is damaged")) from error
        raise _unreadable(where, where, error) from error


BEGINNING = Progress()


def save(manager: ocp.CheckpointManager, state: State, progress: Progress = BEGINNING, success: float = NOT_EVALUATED) -> None:
    """Starts writing a checkpoint; returns once it is copied, before it is on disk (`manager.wait_until_finished`).

    Args:
        success: of its policy, by which it is ranked.
    """
    state = state._replace(base={})  # what never changes is kept once (frozen_base.py)
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), progress=ocp.args.JsonSave(progress._asdict()))
    manager.save(int(state.step), args=items, metrics={"success": success})


def rank(manager: ocp.CheckpointManager, step: int, progress: Progress, success: float) -> None:
    """Gives the checkpoint of `step`, which was saved before its policy was evaluated, what is known since."""
    if jax.process_index() == 0:
        for item, values in (("progress", progress._asdict()), ("metrics", {"success": success})):
            path = manager.directory / str(step) / item / ("metadata" if item == "progress" else "metrics")
            beside = path.with_name(f"{path.name}.new")
            beside.write_text(json.dumps(values))
            beside.replace(path)
    manager.reload()


def restore(manager: ocp.CheckpointManager, like: State, step: int | None = None) -> tuple[State, Progress]:
    """The newest checkpoint (or that of `step`).

    Args:
        like: arrays, or abstract arrays, of the structure, shapes, types and placement that the state shall have. It may have
            been saved from a mesh of any other shape. Its `base` is left out: `frozen_base.load` has it.

    Raises:
        UserError: there is none, or it cannot be read as a state of this config.
    """
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._replace(base={}))
    folder = _folder(manager, step)
    stored = _stored(folder)
    fields = {name: field for name, field in like._asdict().items() if jax.tree.leaves(field)}
    added = {name: fields.pop(name) for name in versions.STATE_ADDED if name in fields and not _below(stored, name)}
    _check_shapes(folder, stored, fields)
    found = _read(folder, manager, state=_arguments(fields), progress=ocp.args.JsonRestore())
    added = {name: versions.STATE_ADDED[name](field) for name, field in added.items()}
    progress = {name: value for name, value in found["progress"].items() if name in Progress._fields}
    return like._replace(**found["state"], **added), Progress(**progress)


def history_steps(manager: ocp.CheckpointManager, step: int | None = None) -> int:
    """RL steps that the entropy history of a checkpoint has room for. Raises UserError as `restore`."""
    return _stored(_folder(manager, step))["history.values"][0]


def restore_fields(manager: ocp.CheckpointManager, like: dict[str, Params], step: int | None = None) -> dict[str, Params]:
    """Some fields of the `TrainState` alone, of the newest checkpoint or that of `step`.

    Args:
        like: for each wanted field, abstract arrays of its shapes, types and placement; without one, on the first device.

    Raises:
        UserError: as `restore`.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device), like)
    folder = _folder(manager, step)
    _check_shapes(folder, _stored(folder), wanted)
    return _read(folder, manager, state=_arguments(wanted))["state"]


def _arguments(like) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True)


def _folder(manager: ocp.CheckpointManager, step: int | None) -> epath.Path:
    """The folder of the newest checkpoint, or of that of `step`. Raises UserError if there is none."""
    step = manager.latest_step() if step is None else step
    if step is None:
        raise UserError(f"{manager.directory} holds no checkpoint; let the run take its first step.")
    folder = manager.directory / str(step)
    if step not in manager.all_steps():
        held = ", ".join(map(str, sorted(manager.all_steps())))
        raise UserError(f"{folder} is not there; choose from the checkpoints of the steps {held}.")
    if (folder / "default").exists():
        raise UserError(f"{folder} was written by an earlier version, whose checkpoints are not read; begin a new run.")
    return folder


def _stored(folder: epath.Path) -> dict[str, tuple[int, ...]]:
    """The shape of every array of the state in a checkpoint, by its dotted name."""
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {_name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}
    except Exception as error:
        raise _unreadable(folder.parent, folder, error) from error


def _name(path) -> str:
    """opt_state.1.0.mu.embedding, of a path in a pytree."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _below(names, field: str) -> list[str]:
    return [name for name in names if name == field or name.startswith(f"{field}.")]


def _check_shapes(folder: epath.Path, stored: dict[str, tuple[int, ...]], like) -> None:
    """Raises UserError unless the checkpoint has every array of `like`, in its shape."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        name = _name(path)
        if stored.get(name) != tuple(leaf.shape):
            has = f"of shape {list(stored[name])}" if name in stored else "missing"
            raise UserError(
                f"{folder}: the state's {name} is {has}, but this config needs one of shape {list(leaf.shape)}; use the config "
                "that the checkpoint was written with."
            )


def _read(folder: epath.Path, manager: ocp.CheckpointManager, **items):
    try:
        return manager.restore(int(folder.name), args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax raises many kinds
        raise _unreadable(folder.parent, folder, error) from error


def _unreadable(where: epath.Path, folder: epath.Path, error: Exception) -> UserError:
    """The sentence for an error that reading `folder` among the checkpoints in `where` ended in; the traceback goes to a log."""
    if not folder.exists():
        return UserError(f"The checkpoint {folder} is gone: the run that writes there has newer ones by now; try again.")
    log = keep_traceback(error, Path(where).parent if where.name == "checkpoints" and where.exists() else None)
    advice = f"if it is damaged, put a copy back, or move it out of {where} to go on from the one before"
    what = explain(error, advice)
    return UserError(f"The checkpoint {folder} cannot be read {what} (nothing was changed; traceback in {log}).")
