"""From a config to what the train step takes: objective, coefficients, and its static config."""

import dataclasses
import importlib

import jax
import numpy as np

from epo_jax.common.errors import UserError
from epo_jax.objectives import registry
from epo_jax.objectives.spec import Hyper, ObjectiveConfig
from epo_jax.settings.config import flatten
from epo_jax.settings.table import SETTINGS
from epo_jax.training.optim import OptimConfig
from epo_jax.training.state import LearnerConfig


def objective_and_hyper(config) -> tuple[ObjectiveConfig, Hyper]:
    """The objective of the method that `algo.name` names, with the config's choices and coefficients.

    Raises:
        UserError: an unknown method, or turns of a mini-batch that the method cannot cut into micro-batches.
    """
    values = flatten(config)
    hyper = Hyper(**{setting.traced: values[setting.key] for setting in SETTINGS if setting.traced})
    choices = {setting.static: values[setting.key] for setting in SETTINGS if setting.static}
    if not config.algo.kl_coef:
        choices["kl"] = "none"
    objective = ObjectiveConfig(
        **choices,
        recompute_old_log_prob=_recomputes_old_log_prob(config),
        truncated_importance=config.algo.importance_cap > 0,
        num_trajectories=config.rollout.groups * config.rollout.group_size,
        max_turns=config.env.max_turns,
        max_tokens=config.agent.max_tokens,
        turn_tokens=config.agent.response_tokens,
        mini_turns=config.algo.mini_batch_turns,
        micro_turns=config.algo.micro_batch_turns,
    )
    hyper = hyper._replace(critic_lr=config.algo.critic_lr or config.optim.lr)
    objective, hyper = registry.method(config.algo.name, objective, hyper, config.env.name)
    if objective.cuts_mini_batches and objective.mini_turns % objective.micro_turns:
        raise UserError(
            f"config.algo.mini_batch_turns={objective.mini_turns} must be a multiple of "
            f"config.algo.micro_batch_turns={objective.micro_turns}."
        )
    return objective, jax.tree.map(np.float32, hyper)


def _recomputes_old_log_prob(config) -> bool:
    """Whether the log-probabilities before the update are the learner's own: on request, and off float32, where sampler and
    learner, two programs, round so differently that ratios of the two are no longer 1 before the first update."""
    rollout = config.rollout
    exact = config.model.dtype == "float32" and rollout.dtype in ("", "float32") and not rollout.cache_dtype
    return config.algo.old_log_prob == "learner" or (config.algo.old_log_prob == "auto" and not exact)


def learner_config(config, model, objective: ObjectiveConfig, row_shards: int = 1) -> LearnerConfig:
    """What is static about the run's train step, on a mesh that deals rows to `row_shards`."""
    algo = config.algo
    # The rates themselves are in Hyper.
    optim = OptimConfig(**config.optim.to_dict() | {"lr": 1.0}, updates=config.train.steps * algo.epochs * algo.mini_batches)
    if objective.mini_batches_by == "turn":  # whose number is not known beforehand
        optim = dataclasses.replace(optim, updates=config.train.steps, schedule="step")
    critic_optim = dataclasses.replace(optim, schedule="constant") if algo.critic_schedule == "constant" else optim
    learner = LearnerConfig(
        model=model,
        objective=objective,
        optim=optim,
        critic_optim=critic_optim if objective.estimator == "gae" else None,
        reference=objective.kl != "none",
        epochs=algo.epochs,
        micro_rows=algo.micro_batch_rows * row_shards,
        total_steps=config.train.steps,
        temperature=config.rollout.temperature,
        critic=algo.critic,
        episode_policy_tokens=(config.env.max_turns * config.agent.response_tokens if config.agent.context == "window" else None),
        gradient_norms=config.metrics.gradient_norms,
    )
    return importlib.import_module(objective.step).configure(learner)
