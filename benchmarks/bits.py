"""Error of sampling with fewer bits: `rollout.dtype` and `rollout.cache_dtype` against the learner's arithmetic.

    python -m benchmarks.bits --model=runs/first             the agent of a run, on an RL step's episodes
    python -m benchmarks.bits --model=FOLDER_OR_GGUF         any model, on 16 short episodes of ALFWorld

Each choice samples the same episodes, and the learner's forward pass scores their tokens in float32. The output is, in nats
over the policy tokens: the mean and the largest difference of the two log-probabilities and of the two entropies, the
divergence of sampler and learner estimated from the samples (k3), and the extremes of the ratio that PPO would clip.
"""

import argparse
import dataclasses

import jax
import numpy as np

from epo_jax.configs.alfworld import get_config
from epo_jax.envs.base import environment
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.rollout import prompts
from epo_jax.rollout.collect import Player, collect
from epo_jax.runs.policies import load
from epo_jax.training.batch import step_batch
from epo_jax.training.from_config import objective_and_hyper
from epo_jax.training.policy_tokens import policy_statistics
from epo_jax.training.tasks import step_episodes

CHOICES = (None, None), (None, "int8"), ("bfloat16", None), ("bfloat16", "int8")


def config_for_a_model(path: str):
    config = get_config("paper")
    config.model.path = path
    config.model.dtype = "float32"
    config.env.update(max_turns=3, train_games=40, valid_seen_games=6, valid_unseen_games=6)
    config.agent.update(response_tokens=48, max_tokens=2048)
    config.rollout.update(groups=4, group_size=4, slots=16, lanes=2)
    config.algo.update(mini_batches_by="episode", mini_batches=1, micro_batch_rows=1)
    config.train.update(rows_tokens=2048, rows_policy_tokens=256)
    return config


def differences(model, params, batch, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """The learner's log-probability and entropy of every policy token less the sampler's, [policy tokens] each."""
    score, found = jax.jit(policy_statistics, static_argnums=(0, 3)), []
    for mini in range(batch.rows.size):
        for row in range(batch.rows[mini]):
            one = batch.by_row()
            one = jax.tree.map(lambda x, at=(mini, row): x[at][None], one)
            log_prob, entropy = score(model, params, one, temperature)
            apart = log_prob - one.behaviour_log_prob, entropy - one.behaviour_entropy
            found.append([x[one.policy_mask > 0] for x in apart])
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run folder, a model folder, a GGUF file or a hub name")
    path = parser.parse_args().model
    short = config_for_a_model(path)
    policy = load(path, None, short)
    config = policy.config or short
    env, options = environment(config.env.name), config.env.to_dict()
    env.prepare(options)
    tasks = env.list_tasks("train", options)
    objective, _ = objective_and_hyper(config)
    temperature = config.rollout.temperature
    with EnvPool(config.env.name, options, config.env.workers) as pool:
        for dtype, cache_dtype in CHOICES:
            settings = dataclasses.replace(prompts.rollout_config(config), dtype=dtype, cache_dtype=cache_dtype)
            episodes = step_episodes(tasks, config, 0, 0)
            player = Player(episodes, policy.tokenizer, jax.random.key(1))
            (trajectories,), _ = collect(
                [player], policy.params, pool, policy.model, settings, prompts.SamplingConfig(temperature)
            )
            batch = step_batch(config, objective, 0, trajectories, 1)
            log_ratio, entropy = differences(policy.model, policy.params, batch, temperature)
            print(
                f"{dtype or 'float32'} arithmetic, {cache_dtype or dtype or 'float32'} cache, {log_ratio.size} tokens: "
                f"log-probability {np.abs(log_ratio).mean():.1e} (largest {np.abs(log_ratio).max():.1e}), "
                f"entropy {np.abs(entropy).mean():.1e} ({np.abs(entropy).max():.1e}), "
                f"k3 {np.mean(np.exp(log_ratio) - 1 - log_ratio):.1e}, "
                f"ratio {np.exp(log_ratio.min()):.3f} to {np.exp(log_ratio.max()):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
