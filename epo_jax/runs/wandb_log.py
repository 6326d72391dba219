"""Weights & Biases next to the files of a run, if `config.metrics.wandb_project` names a project. The package is imported
then and not before; it is no requirement."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from epo_jax.common.errors import UserError

# In the run folder: by it a resumed run finds its run on the server.
ID = "wandb_id"


def package(project: str) -> ModuleType:
    """The module wandb. Raises UserError where it is not installed."""
    try:
        wandb = importlib.import_module("wandb")
        wandb.init  # noqa: B018  a folder named wandb, which holds its runs, passes for a module
    except (ImportError, AttributeError):
        raise UserError(
            f"config.metrics.wandb_project={project!r} needs the package wandb, which is not installed; pip install wandb, or "
            "leave the key empty."
        ) from None
    return wandb


def begin(project: str, workdir: Path, config: dict[str, Any], group: str | None = None):
    """The wandb run of the run in `workdir`, the one that it had before if it is resumed; None where no project is named.

    Nothing is written to `workdir`. With `reinit="create_new"` the members of a sweep have a run each.

    Raises:
        UserError: wandb is not installed, or it does not begin a run.
    """
    if not project:
        return None
    wandb, known = package(project), Path(workdir) / ID
    run_id = known.read_text().strip() if known.exists() else None
    try:
        run = wandb.init(
            project=project, name=Path(workdir).name, group=group, config=config, id=run_id, resume="allow", reinit="create_new"
        )
    except Exception as error:  # wandb raises many kinds; to the user they are one
        raise UserError(
            f"config.metrics.wandb_project={project!r}: wandb does not begin a run ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); log in with `wandb login`, set WANDB_MODE=offline, or leave the key empty."
        ) from error
    # Rows bear their own step: a resumed run writes those after its checkpoint again, evaluations share a step with rows.
    run.define_metric("*", step_metric="step")
    return run
