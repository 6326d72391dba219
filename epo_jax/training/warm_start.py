"""The state of a warm start that was stopped.

It is kept in a folder until the run has its first checkpoint.
"""

import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from epo_jax.common.errors import UserError
from epo_jax.models.decoder import Params
from epo_jax.parallel import mesh
from epo_jax.training.optim import OptimConfig, like_parameters, make_optimizer
from epo_jax.training.sft import Cloning


def save(folder: Path, cloning: Cloning) -> None:
    """Writes the state to `folder`; returns when it is on disk."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(_place(folder, cloning.updates), {"params": cloning.params, "opt_state": cloning.opt_state})


def restore(folder: Path, params: Params, optim: OptimConfig) -> Cloning | None:
    """The newest state in `folder`, None if there is none.

    Args:
        params: arrays of the same shapes and placement.

    Raises:
        UserError: the state cannot be read.
    """
    saved = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    if not saved:
        return None
    on, opt_state = mesh.mesh_of(params), jax.eval_shape(make_optimizer(optim).init, params)
    whole = mesh.replicated(on) if on else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda x: x.sharding if on else whole, params)
    like = {
        "params": mesh.abstract(params, placed),
        "opt_state": mesh.abstract(opt_state, like_parameters(optim, opt_state, placed, lambda _: whole)),
    }
    where = _place(folder, max(saved))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return Cloning(**checkpointer.restore(where, like), updates=max(saved))
    except Exception as error:  # Orbax raises many kinds; to the user they are one
        reason = (str(error).strip().splitlines() or ["no message"])[0][:200]
        raise UserError(
            f"The updates of the warm start in {where} cannot be read ({type(error).__name__}: {reason}); fix what the message "
            "names and resume, or rename the folder and the warm start begins from its first update."
        ) from error


def clear(folder: Path) -> None:
    """Removes what `save` wrote."""
    shutil.rmtree(folder, ignore_errors=True)


def _place(folder: Path, updates: int) -> Path:
    return folder.absolute() / str(updates)
