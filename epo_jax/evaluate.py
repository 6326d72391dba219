"""Evaluation: every episode of a fixed split, once."""

import jax

from epo_jax.envs.base import Task
from epo_jax.envs.pool import EnvPool
from epo_jax.metrics import Row, evaluation_row
from epo_jax.models.decoder import DecoderConfig, Params
from epo_jax.models.tokenizer import ChatTokenizer
from epo_jax.rollout import Episode, RolloutConfig, collect
from epo_jax.trajectory import Trajectory


def evaluate(
    split: str,
    tasks: list[Task],
    step: int,
    pool: EnvPool,
    tokenizer: ChatTokenizer,
    model: DecoderConfig,
    params: Params,
    config: RolloutConfig,
    temperature: float,
    seed: int,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Row, list[Trajectory]]:
    """Plays each of `tasks` once; the row of eval.jsonl and the trajectories in the order of `tasks`.

    The sampling key depends on `seed` alone, so two evaluations of the same parameters agree.
    """
    trajectories, stats = collect(
        episodes_of(tasks), pool, tokenizer, model, params, jax.random.key(seed), config, temperature, top_k, top_p
    )
    return row_of(split, step, trajectories, stats.seconds), trajectories


def episodes_of(tasks: list[Task]) -> list[Episode]:
    """An episode of each task."""
    return [Episode(id=i, task=task, group=i) for i, task in enumerate(tasks)]


def row_of(split: str, step: int, trajectories: list[Trajectory], seconds: float) -> Row:
    """The row of eval.jsonl that the episodes of a split come to."""
    row = evaluation_row(step, split, [(t.task["type"], t.won) for t in trajectories])
    row["score"] = sum(t.score for t in trajectories) / len(trajectories)
    row["turns"] = sum(len(t.actions) for t in trajectories) / len(trajectories)
    row["seconds"] = seconds
    return row
