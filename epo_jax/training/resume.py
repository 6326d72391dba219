"""How a run continues from checkpoints, its own or another run's."""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from epo_jax.common.errors import UserError
from epo_jax.models import lora
from epo_jax.models.decoder import DecoderConfig, Params
from epo_jax.objectives import entropy
from epo_jax.parallel import hosts
from epo_jax.runs import checkpoint, frozen_base
from epo_jax.runs.folder import Changes, read_config
from epo_jax.runs.metrics import read_rows
from epo_jax.runs.policies import source_run, source_step
from epo_jax.training.evaluation import Evaluation, evaluations
from epo_jax.training.from_config import learner_config, objective_and_hyper
from epo_jax.training.state import LearnerConfig, TrainState, abstract_state, abstract_state_on


class Restored(NamedTuple):
    """The states of a run's members; they share the base."""

    base: Params
    own: list[TrainState]
    progress: list[checkpoint.Progress]

    def forgiven(self) -> "Restored":
        """The same with no RL step counted as skipped.

        It is for a run that changes what it learns with.
        """
        return self._replace(progress=[progress._replace(skipped=0) for progress in self.progress])


def restore(
    folders: list[Path], managers: list[ocp.CheckpointManager], config, learner: LearnerConfig, on: Mesh, step: int | None
) -> Restored:
    """The checkpoints of members that share a program, on a mesh.

    They are those of RL step `step`, the newest if None. Of a member that stopped before that step, the newest stands in.

    Raises:
        UserError: one of them, or the base of their adapters, cannot be read.
    """
    like = abstract_state_on(learner, on)
    base, kept = {}, all(hosts.gather(frozen_base.is_kept(folders[0])))
    if learner.model.lora:
        base = frozen_base.load(folders[0], config, learner.model, like.base, step)
    steps = [step if step in manager.all_steps() else None for manager in managers]
    own, progress = zip(*(checkpoint.restore(m, like, s) for m, s in zip(managers, steps, strict=True)), strict=True)
    if learner.model.lora and not kept:  # a run of version 1, with the base in each checkpoint
        frozen_base.store(folders[0], learner.model, base)
        refer_to_base(folders[1:], base, folders[0] / "model")
    return Restored(base, list(own), list(progress))


def refer_to_base(folders: list[Path], base: Params, kept: Path | None) -> None:
    """Refers run folders to the frozen base of their adapters.

    It is in `kept`, or if None in the published model.
    """
    if jax.tree.leaves(base):
        digest = frozen_base.digest(base)
        for folder in folders:
            frozen_base.refer(folder, digest, os.path.relpath(kept, folder / "model") if kept else None)


def begins_at(config) -> int:
    """RL steps done before a new run begins: those of the checkpoint whose whole state it takes, if `config.init_from` names its
    step; else 0."""
    source = config.init_from
    return (source_step(config) or 0) if source.run and source.state == "everything" else 0


def source_state(config, learner: LearnerConfig, devices: Mesh, params: Params) -> Restored:
    """The whole state of the run that `config.init_from` names.

    Its entropy history gets the length that this run needs.
    """
    step, source = source_step(config), source_run(config)
    with checkpoint.open_reader(checkpoint.place(source, read_config(source).checkpoint.folder)) as reader:
        steps = checkpoint.history_steps(reader, step)
        like = abstract_state_on(dataclasses.replace(learner, total_steps=steps), devices)
        state, progress = checkpoint.restore(reader, like, step)
    base = lora.split(params)[0] if learner.model.lora else {}
    state = state._replace(history=entropy.resize(state.history, config.train.steps))
    return Restored(base, [state], [progress._replace(skipped=0)])


def refuse_changes_of_state(config, changes: Changes, model: DecoderConfig) -> None:
    """Raises UserError for a change of the train state's arrays.

    The state would not fit the checkpoints of the run.
    """

    def arrays(config) -> list:
        state = abstract_state(learner_config(config, model, objective_and_hyper(config)[0]))
        return [(path, leaf.shape, leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]

    for key, (old, new) in changes.items():
        before = ConfigDict(config.to_dict())
        before.update_from_flattened_dict({key: old})
        if arrays(before) != arrays(config):
            raise UserError(
                f"--resume: config.{key}={new!r} in place of {old!r} changes the arrays of the state that the run saved; begin a "
                "new run from it with config.init_from."
            )


def missing_evaluations(config, workdir: Path, step: int) -> list[Evaluation]:
    """The evaluations after `step` RL steps that have no row.

    The run was stopped before them.
    """
    if step != config.train.steps and (not config.eval.every or step % config.eval.every):
        return []
    done = {(row["split"], row.get("temperature")) for row in read_rows(workdir / "eval.jsonl") if row["step"] == step}
    missing = hosts.gather([evaluation for evaluation in evaluations(config.eval) if evaluation not in done])[0]
    return [Evaluation(*evaluation) for evaluation in missing]
