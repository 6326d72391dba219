"""From the episodes of an RL step to the learner's batch."""

import numpy as np
from jax.sharding import Mesh

from epo_jax.common import keys
from epo_jax.objectives.batch import TokenBatch
from epo_jax.objectives.spec import ObjectiveConfig
from epo_jax.parallel import mesh
from epo_jax.rollout.packing import BatchShape, pack
from epo_jax.rollout.trajectory import Trajectory


def step_batch(
    config, objective: ObjectiveConfig, step: int, trajectories: list[Trajectory], micro_rows: int, on: Mesh | None = None
) -> TokenBatch:
    """The batch of RL step `step`, in micro-batches of `micro_rows`.

    It has the mini-batches of every epoch; each epoch assigns the episodes to them in another order. Rows on devices of other
    processes in the mesh `on` are 0.
    """
    epochs = 1 if objective.cuts_mini_batches else config.algo.epochs
    orders = np.stack([
        keys.generator(config.seed, "mini-batches", step, epoch).permutation(len(trajectories)) for epoch in range(epochs)
    ])  # fmt: skip
    shape = batch_shape(config, objective, micro_rows)
    own_rows = mesh.own_rows(on, shape.rows(len(trajectories))) if on else None
    return pack(trajectories, shape, orders, config.seed, own_rows)


def batch_shape(config, objective: ObjectiveConfig, micro_rows: int) -> BatchShape:
    """The shape of an RL step's batch.

    With a window, each turn is a context of its own. Mini-batches by turn are as many as the longest episodes would need.
    """
    mini_batches, mini_turns = config.algo.mini_batches, 0
    if objective.cuts_mini_batches:
        mini_batches = 1
    elif objective.mini_batches_by == "turn":
        mini_turns = config.algo.mini_batch_turns
        mini_batches = -(-objective.num_trajectories * config.env.max_turns // mini_turns)
    contexts, per_row = 1, 1
    if config.agent.context == "window":
        contexts = config.env.max_turns
        by_policy_tokens = config.train.rows_policy_tokens // config.agent.response_tokens
        per_row = min(config.train.rows_tokens // config.agent.max_tokens, by_policy_tokens)
    tokens, policy_tokens = config.train.rows_tokens, config.train.rows_policy_tokens
    return BatchShape(tokens, policy_tokens, config.env.max_turns, mini_batches, micro_rows, contexts, per_row, mini_turns)
