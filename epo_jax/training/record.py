"""The row of metrics.jsonl that an RL step results in."""

import numpy as np

from epo_jax.objectives import registry
from epo_jax.rollout import scheduler
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.runs.metrics import Row
from epo_jax.training.episode_metrics import (
    action_information,
    early_and_late_entropy,
    entropy_by_turn,
    entropy_spread,
    policy_tokens,
    repeated_actions,
)


def step_row(
    config, step: int, rounds: list[list[Trajectory]], uniform: int, stats: scheduler.RolloutStats, metrics: dict[str, float]
) -> Row:
    """The row of one RL step; docs/metrics.md has its fields.

    Args:
        rounds: all episodes of the step, the tasks as they come first.
        uniform: groups with one return among those that were trained on.
        stats: of the rollout, in which the members of a sweep play together.
        metrics: of the train step.
    """
    # Averages are over the first round: tasks as they come, not chosen by their returns.
    sampled, center = rounds[0], metrics["corridor_center"]
    kappa_l, kappa_r = corridor_edges(config)
    tokens = policy_tokens(sampled)
    played = [t for trajectories in rounds for t in trajectories]
    emitted = sum(t.num_policy_tokens for t in played)
    return {
        "step": step,
        "success": np.mean([t.won for t in sampled]),
        "reward": np.mean([sum(t.rewards) for t in sampled]),
        "score": np.mean([t.score for t in sampled]),
        "turns": np.mean([len(t.actions) for t in sampled]),
        "invalid_actions": 1.0 - np.mean([v for t in sampled for v in t.valid]),
        "tokens": np.mean([len(t.tokens) for t in sampled]),
        "repeated_actions": repeated_actions(sampled),
        "truncated": np.mean([t.truncated for t in sampled]),
        "full_context": np.mean([t.full for t in sampled]),
        "rollout_rounds": len(rounds),
        "uniform_groups": uniform,
        "corridor_low": kappa_l * center if step else None,
        "corridor_high": kappa_r * center if step else None,
        **action_information(sampled),
        **early_and_late_entropy(tokens),
        **entropy_spread(tokens),
        **{f"entropy_turn_{turn}": entropy for turn, entropy in entropy_by_turn(tokens).items()},
        "prompt_tokens": sum(len(t.tokens) for t in played) - emitted,
        "policy_tokens": emitted,
        "tokens_per_second": emitted / stats.seconds,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "env_wait_seconds": stats.env_wait_seconds,
        "env_steps": sum(len(t.actions) for t in played),
        **metrics,
        "learner_entropy": metrics["entropy"],
        "entropy": metrics["behaviour_entropy"],
    }


def corridor_edges(config) -> tuple[float, float]:
    """The edges of the corridor, as multiples of its center: those of the config, unless the method has its own."""
    own = registry.settings_of(config.algo.name, config.env.name)
    return own.get("kappa_l", config.epo.kappa_l), own.get("kappa_r", config.epo.kappa_r)
