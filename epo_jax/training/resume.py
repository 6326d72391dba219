"""How a run continues: what may change, what is still to be evaluated, and the state of another run."""

import dataclasses
from pathlib import Path

import jax
from ml_collections import ConfigDict

from epo_jax.common.errors import UserError
from epo_jax.models import lora
from epo_jax.models.decoder import DecoderConfig, Params
from epo_jax.objectives import entropy
from epo_jax.parallel import hosts
from epo_jax.runs import checkpoint
from epo_jax.runs.folder import Changes, read_config
from epo_jax.runs.metrics import read_rows
from epo_jax.training.from_config import learner_config, objective_and_hyper
from epo_jax.training.state import LearnerConfig, TrainState, abstract_state, abstract_state_on


def source_state(config, learner: LearnerConfig, devices, params: Params) -> tuple[TrainState, checkpoint.Progress]:
    """The whole state of the run that `config.init_from` names; its entropy history gets the length that this run needs."""
    source = config.init_from
    step = None if source.step < 0 else source.step
    with checkpoint.open_reader(checkpoint.place(source.run, read_config(source.run).checkpoint.folder)) as reader:
        steps = checkpoint.history_steps(reader, step)
        like = abstract_state_on(dataclasses.replace(learner, total_steps=steps), devices)
        state, before = checkpoint.restore(reader, like, step)
    base = lora.split(params)[0] if learner.model.lora else {}
    return state._replace(history=entropy.resize(state.history, config.train.steps), base=base), before._replace(skipped=0)


def refuse_changes_of_state(config, changes: Changes, model: DecoderConfig) -> None:
    """Raises UserError for a change by which the train state would have other arrays than the run's checkpoints."""

    def arrays(config) -> list:
        state = abstract_state(learner_config(config, model, objective_and_hyper(config)[0]))
        return [(path, leaf.shape, leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]

    for key, (old, new) in changes.items():
        before = ConfigDict(config.to_dict())
        section, _, leaf = key.partition(".")
        before[section][leaf] = old
        if arrays(before) != arrays(config):
            raise UserError(
                f"--resume: config.{key}={new!r} in place of {old!r} changes the arrays of the state that the run saved; begin a "
                "new run from it with config.init_from."
            )


def splits_to_evaluate(config, workdir: Path, step: int) -> list[str]:
    """The splits whose evaluation after RL step `step` is due and missing, as the run was stopped in it."""
    if step != config.train.steps and (not config.eval.every or step % config.eval.every):
        return []
    evaluated = {row["split"] for row in read_rows(workdir / "eval.jsonl") if row["step"] == step}
    return hosts.gather([split for split in config.eval.splits if split not in evaluated])[0]
