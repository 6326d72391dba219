"""From a config to what the train step is given: objective, coefficients, and its static config."""


import jax
import numpy as np

from epo_jax.objectives import registry
from epo_jax.objectives.loss import Hyper, ObjectiveConfig
from epo_jax.training.optim import OptimConfig
from epo_jax.training.state import LearnerConfig


def objective_and_hyper(config) -> tuple[ObjectiveConfig, Hyper]:
    """The objective of the arm that `algo.name` names, with the config's choices and coefficients."""
    algo, epo = config.algo, config.epo
    objective = ObjectiveConfig(
        gae_scope=algo.gae_scope,
        whiten=algo.whiten,
        format_penalty_place=algo.format_penalty_place,
        aggregation=algo.aggregation,
        kl=algo.kl_kind if algo.kl_coef else "none",
        kl_place=algo.kl_place,
        kl_controller=algo.kl_controller,
        recompute_old_log_prob=_recomputes_old_log_prob(config),
        truncated_importance=algo.importance_cap > 0,
        penalty=epo.penalty,
        penalty_scope=epo.scope,
        history=epo.history,
        history_index=epo.history_index,
        phase=epo.phase,
        turn_gate=epo.turn_gate,
        nucleus=config.control.nucleus,
        entropy_aggregation=epo.aggregation,
        num_trajectories=config.rollout.groups * config.rollout.group_size,
        max_turns=config.env.max_turns,
        max_tokens=config.agent.max_tokens,
        turn_tokens=config.agent.response_tokens,
        mini_turns=algo.released_mini_turns,
        micro_turns=algo.released_micro_turns,
    )
    coefficients = {**config.control.to_dict(), **epo.to_dict(), **algo.to_dict(), "gamma": epo.gamma, "discount": algo.gamma}
    coefficients["lr"] = config.optim.lr
    hyper = Hyper(**{name: value for name, value in coefficients.items() if name in Hyper._fields})
    objective, hyper = registry.arm(algo.name, objective, hyper)
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
    updates = config.train.steps * (1 if objective.released else algo.epochs * algo.mini_batches)

    def optim(**changes) -> OptimConfig:
        settings = config.optim.to_dict() | {"lr": 1.0} | changes  # the rates themselves are in Hyper
        return OptimConfig(updates=updates, released=objective.released, **settings)

    critic = {"warmup_ratio": 0.0, "floor_ratio": 1.0} if objective.released else {}  # the release's critic has one rate

    return LearnerConfig(
        model=model,
        objective=objective,
        optim=optim(),
        critic_optim=optim(**critic) if objective.estimator == "gae" else None,
        reference=objective.kl != "none",
        epochs=algo.epochs,
        micro_rows=algo.micro_batch_rows * row_shards,
        total_steps=config.train.steps,
        temperature=config.rollout.temperature,
        critic=algo.critic,
        episode_policy_tokens=(
            config.env.max_turns * config.agent.response_tokens if config.agent.context == "window" else None
        ),
    )
