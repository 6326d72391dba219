"""Every preset on eight devices: its state, its train step and its warm start are traced there, and nothing is computed."""

import dataclasses
import functools

import jax
import pytest

from epo_jax.models.decoder import decoder_config, init_params, param_axes, with_adapters
from epo_jax.parallel import mesh
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.training import sft
from epo_jax.training.batch import step_batch
from epo_jax.training.from_config import learner_config, objective_and_hyper
from epo_jax.training.initial_policy import cloning_optim
from epo_jax.training.optim import make_optimizer
from epo_jax.training.state import abstract_state_on
from epo_jax.training.step import batch_shardings, make_train_step
from tests.settings.test_config import preset


@pytest.mark.parametrize(
    "file, name, shape",
    [
        ("alfworld", "paper", (2, 2, 2)),
        ("alfworld", "laptop", (2, 2, 2)),
        ("alfworld", "demo", (8, 1, 1)),
        ("alfworld", "smoke", (8, 1, 1)),
        ("scienceworld", "paper", (1, 2, 4)),
        ("scienceworld", "laptop", (8, 1, 1)),
        ("scienceworld", "smoke", (2, 4, 1)),
        ("ablation", "paper", (1, 8, 1)),
        ("ablation", "paper-scienceworld", (2, 2, 2)),
    ],
)
def test_every_preset_can_be_trained_on_eight_devices(file, name, shape):
    config = preset(file, name)
    if file == "ablation":
        config.algo.name = "ppo+epo"  # with a critic
    objective, hyper = objective_and_hyper(config)
    plain, on = decoder_config(config.model), mesh.make_mesh(*shape)
    model = with_adapters(plain, config.model) if config.model.lora_rank else plain
    mesh.check(on, model, config.train.rows_tokens)
    learner = learner_config(config, model, objective, mesh.row_shards(on))

    episodes = [Trajectory({"id": "", "type": ""}) for _ in range(objective.num_trajectories)]
    batch = step_batch(config, objective, 0, episodes, learner.micro_rows)
    batch = mesh.abstract(batch, batch_shardings(on))
    state = abstract_state_on(learner, on)
    after, _ = make_train_step(learner, on).lower(state, batch, hyper).out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)

    optim = cloning_optim(config)
    params = jax.eval_shape(functools.partial(init_params, plain), jax.random.key(0))
    params = mesh.abstract(params, mesh.shardings(on, params, param_axes(plain)))
    opt_state = jax.eval_shape(make_optimizer(optim).init, params)
    wide = jax.ShapeDtypeStruct((mesh.row_shards(on), config.train.rows_tokens), "int32")
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(wide.shape, x.dtype), batch.by_row())
    sft.make_cloning_step(plain, dataclasses.replace(optim, updates=3), 0.3, on).lower(params, opt_state, rows)
