"""The train step: what it must not depend on, and that it reaches a known optimum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from epo_jax.envs import toy
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models.decoder import DecoderConfig, init_params
from epo_jax.models.tokenizer import train_tokenizer
from epo_jax.objectives import registry
from epo_jax.objectives.spec import Hyper, ObjectiveConfig
from epo_jax.rollout import prompts
from epo_jax.rollout.collect import Player, collect
from epo_jax.rollout.episode import Episode
from epo_jax.rollout.packing import BatchShape, pack
from epo_jax.training import sft
from epo_jax.training.optim import OptimConfig
from epo_jax.training.policy_tokens import policy_statistics
from epo_jax.training.state import LearnerConfig, init_state
from epo_jax.training.step import make_train_step

OPTIONS = {"name": "toy"}
GROUPS, SIZE = 8, 8
SETTINGS = prompts.RolloutConfig(slots=64, max_turns=2, max_tokens=96, max_policy_tokens=32, response_tokens=8, style="bare")


@pytest.fixture(scope="module")
def world():
    """A cloned beginner in the toy game: (tokenizer, model, params, tasks)."""
    tasks = toy.list_tasks("train", OPTIONS)[:GROUPS]
    demonstrations = toy.demonstrations(toy.list_tasks("train", OPTIONS), OPTIONS)
    texts = [text for d in demonstrations for pair in sft.transcript(d, "bare") for text in pair]
    tokenizer = train_tokenizer(texts, 400)
    model = DecoderConfig(tokenizer.vocab_size, 32, 2, 2, 1, 16, 64)
    params = init_params(model, jax.random.key(0))
    trajectories = [sft.to_trajectory(d, tokenizer, SETTINGS) for d in demonstrations]
    for cloned, *_ in sft.warm_start(params, trajectories, model, OptimConfig(5e-3, 40), 128, 8, 0.1, 0):
        params = cloned
    return tokenizer, model, jax.tree.map(np.asarray, params), tasks


@pytest.fixture(scope="module")
def sampled(world):
    """Trajectories of one step of the beginner."""
    return play(world, world[2], 0)


def play(world, params, step):
    tokenizer, model, _, tasks = world
    episodes = [Episode(step * 64 + j, tasks[j // SIZE], j // SIZE) for j in range(64)]
    with EnvPool("toy", OPTIONS, 1) as pool:
        player = Player(episodes, tokenizer, jax.random.key(1))
        return collect([player], params, pool, model, SETTINGS, prompts.SamplingConfig(1.0))[0][0]


def learner(world, arm="grpo+epo", micro_rows=4, **changes):
    objective, hyper = registry.method(
        arm, ObjectiveConfig(num_trajectories=64, max_turns=2, kl="none"), Hyper(lr=1.0, critic_lr=1.0)
    )
    optim = OptimConfig(3e-3, 90)
    critic = optim if objective.estimator == "gae" else None
    config = LearnerConfig(world[1], objective, optim, critic, objective.kl != "none", 1, micro_rows, 20, 1.0)
    return dataclasses.replace(config, **changes), jax.tree.map(np.float32, hyper)


def update(world, sampled, config, hyper, mini_batches=2, rows_multiple=4, steps=1):
    batch = pack(sampled, BatchShape(128, 64, 2, mini_batches, rows_multiple), np.random.default_rng(0).permutation(64))
    state = init_state(config, jax.tree.map(jnp.asarray, world[2]))
    train_step = make_train_step(config)
    for _ in range(steps):
        state, metrics = train_step(state, batch, hyper)
    return state, metrics


def test_the_learner_agrees_with_the_sampler(world, sampled):
    """Log-probability and entropy of the sampled tokens: decode with a cache against the packed forward."""
    batch = pack(sampled, BatchShape(128, 64, 2))
    rows = jax.tree.map(lambda x: jnp.asarray(x[0]), batch.by_row())
    log_prob, entropy = policy_statistics(world[1], jax.tree.map(jnp.asarray, world[2]), rows, 1.0)
    mask = batch.policy_mask[0] > 0
    np.testing.assert_allclose(log_prob[mask], batch.behaviour_log_prob[0][mask], atol=1e-4)
    np.testing.assert_allclose(entropy[mask], batch.behaviour_entropy[0][mask], atol=1e-4)


@pytest.mark.parametrize("arm", ["grpo+epo", "ppo+epo"])
def test_the_split_into_micro_batches_changes_nothing(world, sampled, arm):
    whole, metrics = update(world, sampled, *learner(world, arm, micro_rows=8), 1, 8)
    split, split_metrics = update(world, sampled, *learner(world, arm, micro_rows=1), 1, 8)
    # After one update Adam's first moment is the gradient times a constant; the parameters would show its sign.
    moments = (optax.tree_utils.tree_get(state.opt_state, "mu") for state in (whole, split))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), *moments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), metrics, split_metrics)


def test_the_first_step_has_no_corridor_and_the_second_has_the_first_entropy(world, sampled):
    config, hyper = learner(world)
    first, metrics = update(world, sampled, config, hyper)
    assert metrics["corridor_center"] == 0.0 and metrics["outside_corridor"] == 0.0
    entropy = np.mean([h for t in sampled for h, turn in zip(t.entropy, t.turn, strict=True) if turn >= 0])
    np.testing.assert_allclose(metrics["behaviour_entropy"], entropy, rtol=1e-5)
    _, metrics = update(world, sampled, config, hyper, steps=2)
    np.testing.assert_allclose(metrics["corridor_center"], entropy, rtol=1e-5)
    assert int(first.history.count) == 1 and int(first.step) == 1


def test_coefficients_are_traced_and_shapes_are_fixed(world, sampled, max_traces):
    config, hyper = learner(world)
    train_step = make_train_step(config)
    max_traces(train_step, 1)
    state = init_state(config, jax.tree.map(jnp.asarray, world[2]))
    for lam, members in ((0.0, sampled), (0.5, sampled[::-1]), (0.1, [*sampled[:32]] * 2)):
        batch = pack(members, BatchShape(128, 64, 2, 2, 4))
        state, _ = train_step(state, batch, hyper._replace(lam=np.float32(lam)))


def test_the_reference_penalty_is_zero_at_first_and_pulls_back_later(world, sampled):
    config, hyper = learner(world)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, kl="k3"), reference=True)
    _, metrics = update(world, sampled, config, hyper, mini_batches=1)
    assert abs(metrics["kl"]) < 1e-6
    drift = {}
    for kl_coef in (0.0, 100.0):
        state, _ = update(world, sampled, config, hyper._replace(kl_coef=np.float32(kl_coef)), steps=10)
        moved = jax.tree.map(lambda a, b: jnp.square(a - b).sum(), state.params, world[2])
        drift[kl_coef] = float(sum(jax.tree.leaves(moved)))
    assert drift[100.0] < drift[0.0]


@pytest.mark.parametrize("arm", ["grpo+epo", "ppo+epo"])
def test_the_toy_game_is_learnt_to_its_optimum(world, arm):
    """The best policy wins every episode (return 10); the beginner is not there yet."""
    config, hyper = learner(world, arm)
    train_step = make_train_step(config)
    state = init_state(config, jax.tree.map(jnp.asarray, world[2]))
    won = []
    for step in range(45):
        trajectories = play(world, state.params, step)
        won.append(np.mean([t.won for t in trajectories]))
        batch = pack(trajectories, BatchShape(128, 64, 2, 2, 4), np.random.default_rng(step).permutation(64))
        state, _ = train_step(state, batch, hyper)
    assert won[0] < 0.7, f"the beginner wins {won[0]:.0%} already: nothing is left to learn"
    assert np.mean(won[-3:]) > 0.93, f"success by step: {won}"
