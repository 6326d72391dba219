"""Evaluation: every episode of a split, once or, for pass@k, several times."""

from typing import NamedTuple

from epo_jax.common import keys
from epo_jax.envs.base import Task
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.rollout.collect import Player, collect, warn_full
from epo_jax.rollout.episode import Episode
from epo_jax.rollout.prompts import RolloutConfig, SamplingConfig
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.runs.metrics import Outcome, Row, evaluation_row
from epo_jax.runs.policies import Policy


class Evaluation(NamedTuple):
    """What a row of eval.jsonl is about: a split, and a temperature; None: config.eval.temperature."""

    split: str
    temperature: float | None = None

    def sampling(self, settings) -> SamplingConfig:
        """How it samples under `config.eval`."""
        temperature = settings.temperature if self.temperature is None else self.temperature
        return SamplingConfig(temperature, settings.top_k, settings.top_p)


def evaluations(settings) -> list[Evaluation]:
    """What `config.eval` evaluates, in order.

    The last one is the last split at `eval.temperature`, whose success ranks checkpoints: an evaluation that was stopped and is
    continued always ends with it.
    """
    return [Evaluation(split, temperature) for split in settings.splits for temperature in (*settings.also_temperatures, None)]


def evaluate(
    evaluation: Evaluation,
    tasks: list[Task],
    policy: Policy,
    pool: EnvPool,
    config: RolloutConfig,
    sampling: SamplingConfig,
    seed: int,
    samples: int = 1,
) -> tuple[Row, list[Trajectory]]:
    """Plays each task `samples` times; the row of eval.jsonl and the trajectories.

    The sampling key depends on `seed` alone, so two evaluations of the same parameters agree, and the first play of a task does
    not depend on `samples`.
    """
    key = keys.key(seed, "evaluation")
    player = Player(episodes_of(tasks, samples), policy.tokenizer, key)
    (trajectories,), stats = collect(
        [player], policy.params, pool, policy.model, config, sampling, f"evaluation on {evaluation.split}"
    )
    warn_full(trajectories, config)
    return row_of(evaluation, policy.step, trajectories, stats.seconds), trajectories


def episodes_of(tasks: list[Task], samples: int = 1) -> list[Episode]:
    """`samples` episodes of each task."""
    return [Episode(play * len(tasks) + i, task, group=i) for i, task in enumerate(tasks) for play in range(samples)]


def row_of(evaluation: Evaluation, step: int | None, trajectories: list[Trajectory], seconds: float) -> Row:
    """The row of eval.jsonl that the episodes of an evaluation result in."""
    outcomes = (
        Outcome(t.task["type"], t.task["id"], t.won, t.score, len(t.actions), len(t.valid) - sum(t.valid), t.won_reference)
        for t in trajectories
    )
    full = sum(t.full for t in trajectories) / max(len(trajectories), 1)
    row = evaluation_row(step, evaluation.split, outcomes) | {"full_context": full, "seconds": seconds}
    return row if evaluation.temperature is None else row | {"temperature": evaluation.temperature}
