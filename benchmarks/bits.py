"""What fewer bits cost while sampling: `rollout.dtype` and `rollout.cache_dtype` against the learner's own arithmetic.

    python -m benchmarks.bits --model=runs/first             the agent of a run, on an RL step's episodes
    python -m benchmarks.bits --model=FOLDER_OR_GGUF         any model, on 16 short episodes of ALFWorld

The same episodes are sampled with each choice, and their tokens scored by the learner's forward in float32. Printed are, in nats
over the policy tokens: the mean and the largest difference of the two log-probabilities and of the two entropies, the
divergence of sampler and learner that the samples estimate (k3), and the extremes of the ratio that PPO would clip.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from configs.alfworld import get_config
from epo_jax import main as program
from epo_jax import prompting, rollout
from epo_jax.envs.base import environment
from epo_jax.envs.pool import EnvPool
from epo_jax.folders import load
from epo_jax.learner import Inputs, policy_statistics

CHOICES = (None, None), (None, "int8"), ("bfloat16", None), ("bfloat16", "int8")


def config_for_a_model(path: str):
    config = get_config("paper")
    config.model.path = path
    config.model.dtype = "float32"
    config.env.update(max_turns=3, train_games=40, valid_seen_games=6, valid_unseen_games=6)
    config.agent.update(response_tokens=48, max_tokens=2048)
    config.rollout.update(groups=4, group_size=4, slots=16, lanes=2)
    config.algo.update(mini_batches=1, micro_batch_rows=1)
    config.train.update(rows_tokens=2048, rows_policy_tokens=256)
    return config


def scored(model, params, batch, temperature: float):
    """Log-probability and entropy of every policy token by the learner's forward, [policy tokens] each."""
    score = jax.jit(policy_statistics, static_argnums=(0, 3))
    found = []
    for mini in range(batch.rows.size):
        for row in range(batch.rows[mini]):
            inputs = Inputs(*(getattr(batch, name)[mini, row : row + 1] for name in Inputs._fields))
            found.append([x[0][batch.policy_mask[mini, row] > 0] for x in score(model, params, inputs, temperature)])
    return (np.concatenate(column) for column in zip(*found, strict=True))


def recorded(batch, name: str) -> np.ndarray:
    return np.concatenate([
        getattr(batch, name)[mini, row][batch.policy_mask[mini, row] > 0]
        for mini in range(batch.rows.size)
        for row in range(batch.rows[mini])
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run folder, a model folder, a GGUF file or a hub name")
    path = parser.parse_args().model
    policy = load(path, None, config_for_a_model(path))
    config = policy.config or config_for_a_model(path)
    env, options = environment(config.env.name), config.env.to_dict()
    env.prepare(options)
    tasks = env.list_tasks("train", options)
    objective, _ = program.objective_and_hyper(config)
    temperature = config.rollout.temperature
    params = jax.tree.map(jnp.asarray, policy.params)
    with EnvPool(config.env.name, options, config.env.workers) as pool:
        for dtype, cache_dtype in CHOICES:
            settings = dataclasses.replace(prompting.rollout_config(config), dtype=dtype, cache_dtype=cache_dtype)
            episodes = program.step_episodes(tasks, config, 0, 0)
            trajectories, _ = rollout.collect(
                episodes, pool, policy.tokenizer, policy.model, params, jax.random.key(1), settings, temperature
            )
            batch = program.step_batch(config, objective, 0, trajectories, 1)
            log_prob, entropy = scored(policy.model, params, batch, temperature)
            log_ratio = log_prob - recorded(batch, "behaviour_log_prob")
            apart = np.abs(entropy - recorded(batch, "behaviour_entropy"))
            print(
                f"{dtype or 'float32'} arithmetic, {cache_dtype or dtype or 'float32'} cache, {log_ratio.size} tokens: "
                f"log-probability {np.abs(log_ratio).mean():.1e} (largest {np.abs(log_ratio).max():.1e}), "
                f"entropy {apart.mean():.1e} ({apart.max():.1e}), "
                f"k3 {np.mean(np.exp(log_ratio) - 1 - log_ratio):.1e}, "
                f"ratio {np.exp(log_ratio.min()):.3f} to {np.exp(log_ratio.max()):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
