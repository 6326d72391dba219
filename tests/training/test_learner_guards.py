"""What a train step leaves as it was: nothing to train on, nothing finite; and what it draws, and epochs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from epo_jax.common import keys
from epo_jax.models.decoder import init_params
from epo_jax.objectives import controls, entropy
from epo_jax.objectives.batch import Old
from epo_jax.objectives.loss import weigh
from epo_jax.objectives.spec import Hyper
from epo_jax.rollout.packing import BatchShape, pack
from epo_jax.settings.config import base_config
from epo_jax.training.batch import step_batch
from epo_jax.training.from_config import objective_and_hyper
from epo_jax.training.state import init_state
from epo_jax.training.step import make_train_step
from tests import tiny
from tests.rollout.test_windows import split

UNTIED = dataclasses.replace(tiny.MODEL, tie_embeddings=False)


@functools.cache
def adaptive():
    """(batch, reference) -> (state, metrics): a step whose KL coefficient, 1.5 times the given one, follows the divergence."""
    config, hyper = tiny.learner("grpo", kl_controller="adaptive", kl_target=1e-3, kl_horizon=30.0)
    config = dataclasses.replace(config, model=UNTIED)
    params = jax.tree.map(np.asarray, init_params(UNTIED, jax.random.key(0)))
    step = make_train_step(config)

    def after(batch, reference):
        state = init_state(config, jax.tree.map(jnp.asarray, params))
        return step(state._replace(reference=reference, kl_scale=jnp.float32(1.5)), batch, hyper)

    return after


def reference(without_token=None):
    """Another policy; with NaN in the embedding of a token, so that every row that holds it has no finite divergence."""
    params = init_params(UNTIED, jax.random.key(1))
    if without_token is not None:
        params["embedding"] = params["embedding"].at[without_token].set(jnp.nan)
    return params


def test_the_adaptive_kl_coefficient_ignores_what_is_not_finite():
    batch, step = tiny.batched(tiny.episodes(0), 2), adaptive()
    tokens = np.where(batch.tokens == 22, 21, batch.tokens)
    sound, expected = step(batch._replace(tokens=tokens), reference())
    assert sound.kl_scale != 1.5
    tokens[1, 0, 0] = 22  # in the second mini-batch alone
    state, metrics = step(batch._replace(tokens=tokens), reference(without_token=22))
    assert metrics["skipped_updates"] == 1 and expected["skipped_updates"] == 0
    assert np.isfinite(state.kl_scale) and state.kl_scale != 1.5
    tokens[0, 0, 0] = 22  # in both: no divergence is known
    state, _ = step(batch._replace(tokens=tokens), reference(without_token=22))
    assert state.kl_scale == 1.5


def test_the_adaptive_kl_coefficient_is_kept_without_a_token():
    batch = tiny.batched(tiny.episodes(0), 2)
    state, metrics = adaptive()(batch._replace(policy_mask=np.zeros_like(batch.policy_mask)), reference())
    assert state.kl_scale == 1.5 and metrics["updates"] == 0


@pytest.mark.parametrize("index", ["global", "turn"])
def test_an_entropy_that_is_not_finite_leaves_the_corridor_to_the_other_steps(index):
    width = 1 if index == "global" else tiny.TURNS
    history = entropy.init_history(4, None if index == "global" else tiny.TURNS)
    for value in (1.0, np.nan, 3.0):
        history = entropy.append(history, jnp.full(width, value), jnp.ones(width))
    center = entropy.center(history)
    np.testing.assert_array_equal(center.value, np.full(width, 2.0))
    np.testing.assert_array_equal(center.known, np.ones(width))
    # What a step measures where one token's entropy is NaN: of its own turn alone, where each has a history.
    found, observed = entropy.step_entropy(
        jnp.array([[1.0, jnp.nan]]), jnp.ones((1, 2)), jnp.array([[0, 1]]), None if width == 1 else 2
    )
    after = entropy.append(entropy.init_history(1, None if width == 1 else 2), found, observed)
    assert after.observed[0].tolist() == ([0.0] if width == 1 else [1.0, 0.0])
    assert np.isfinite(after.values).all()


def test_the_corridors_center_is_that_of_the_turns_which_have_a_history():
    """Turn 0 alone was seen before: its mean, not that mean over all turn numbers."""
    config, hyper = tiny.learner("grpo+epo", history_index="turn", kl="none")
    history = entropy.append(entropy.init_history(4, tiny.TURNS), jnp.full(tiny.TURNS, 2.44), jnp.array([1.0, 0.0, 0.0]))
    _, metrics = tiny.program(config)(tiny.start(config, history=history), tiny.batched(tiny.episodes(0), 1), hyper)
    assert metrics["corridor_center"] == pytest.approx(2.44)


def test_a_mini_batch_without_a_token_to_train_on_moves_nothing():
    """DAPO: all groups of the first mini-batch have equal returns. Adam's moments would move the weights all the same."""
    trajectories = tiny.episodes(0, uniform=(0,))
    config, hyper = tiny.learner("dapo")
    step = make_train_step(config)
    moments = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), tiny.start(config).opt_state)
    level = pack(trajectories[: tiny.SIZE] * 3, BatchShape(tiny.ROW, tiny.POLICY, tiny.TURNS, 1, 2))
    state, metrics = step(tiny.start(config, opt_state=moments), level, hyper)
    assert metrics["updates"] == 0 and metrics["skipped_updates"] == 0
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (tiny.as_params(), moments))
    # One group a mini-batch: two of the three are updates, and the optimizer counts two.
    batch = pack(trajectories, BatchShape(tiny.ROW, tiny.POLICY, tiny.TURNS, tiny.GROUPS, 2))
    state, metrics = make_train_step(config)(tiny.start(config), batch, hyper)
    assert metrics["updates"] == 2
    assert {int(count) for _, count in optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")} == {2}


def draws(trajectories, seed=0, **sizes):
    """{(episode, turn, position): uniform} as Clip-Cov has them in a packing."""
    batch = pack(trajectories, BatchShape(tiny.ROW, tiny.POLICY, tiny.TURNS, **sizes), seed=seed)
    objective = tiny.learner("grpo+clip_cov")[0].objective
    episode_keys = jax.vmap(functools.partial(jax.random.fold_in, keys.key(batch.seed, "learner")))(batch.episode)
    found = {}
    for m in range(len(batch.rows)):
        mini = jax.tree.map(lambda x, m=m: jnp.asarray(x[m]), batch.by_row())
        mask, trajectory, turn = mini.policy_mask, mini.trajectory, mini.turn
        zeros = jnp.zeros_like(mask)
        rows = weigh(mini, Old(zeros, zeros, zeros, zeros, mask, zeros, zeros), Hyper(), objective, episode_keys)
        uniform, seen = np.asarray(controls.uniforms(rows, episode_keys)), {}
        for r, p in np.argwhere(np.asarray(mask) > 0):
            turn_of = int(batch.episode[trajectory[r, p]]), int(turn[r, p])
            seen[turn_of] = seen.get(turn_of, -1) + 1
            found[*turn_of, seen[turn_of]] = float(uniform[r, p])
    return found


def test_clip_covs_draws_depend_on_seed_episode_turn_and_position_alone():
    trajectories = tiny.episodes(0)
    expected = draws(trajectories)
    assert len(set(expected.values())) == len(expected) == sum(t.num_policy_tokens for t in trajectories)
    assert draws([split(t) for t in trajectories], contexts=tiny.TURNS) == expected
    assert draws(trajectories[::-1], mini_batches=3) == expected
    assert draws(trajectories[:5]).items() <= expected.items()
    other = draws(trajectories, seed=2**32 - 1)
    assert not set(other.values()) & set(expected.values())


def test_every_epoch_has_every_token_in_other_mini_batches():
    config = base_config("toy", max_turns=tiny.TURNS)
    config.agent.context = "chat"
    config.train.update(rows_tokens=tiny.ROW, rows_policy_tokens=tiny.POLICY)
    config.algo.update(epochs=3, mini_batches=2)
    batch = step_batch(config, tiny.OBJECTIVE, 0, tiny.episodes(0), 2)
    members = [set(batch.trajectory[m][batch.policy_mask[m] > 0]) for m in range(6)]
    for epoch in range(3):
        first, second = members[2 * epoch : 2 * epoch + 2]
        assert first | second == set(range(tiny.EPISODES)) and not first & second
    assert len({frozenset(m) for m in members}) == 6
    assert batch.policy_mask.sum() == 3 * sum(t.num_policy_tokens for t in tiny.episodes(0))


def by_turn(style: str, mini_turns: int, epochs: int = 1):
    """A batch as a run with mini-batches by turn packs it."""
    config = base_config("toy", max_turns=tiny.TURNS)
    config.agent.update(context=style, response_tokens=4, max_tokens=tiny.ROW)
    config.train.update(rows_tokens=tiny.ROW, rows_policy_tokens=tiny.POLICY)
    config.algo.update(epochs=epochs, mini_batch_turns=mini_turns)
    trajectories = [split(t) if style == "window" else t for t in tiny.episodes(0)]
    objective = dataclasses.replace(tiny.OBJECTIVE, mini_batches_by="turn")
    return step_batch(config, objective, 0, trajectories, 2), sum(len(t.actions) for t in trajectories)


def test_mini_batches_by_turn_have_that_many_turns():
    for style in ("chat", "window"):
        batch, turns = by_turn(style, 5, epochs=2)
        most, count = -(-tiny.EPISODES * tiny.TURNS // 5), -(-turns // 5)
        assert batch.rows.shape == (2 * most,) and count < most
        for epoch in (0, 1):
            found = []
            for m in range(epoch * most, (epoch + 1) * most):
                live = batch.policy_mask[m] > 0
                found.append({*zip(batch.trajectory[m][live].tolist(), batch.turn[m][live].tolist(), strict=True)})
            assert all(found[:count]) and not any(found[count:])
            assert len(set().union(*found)) == sum(map(len, found)) == turns
            sizes = [*map(len, found[:count])]
            if style == "window":
                assert max(sizes) <= 5 and max(sizes) - min(sizes) <= 1
            else:
                assert max(sizes) < 5 + tiny.TURNS


def test_mini_batches_without_turns_are_no_updates_and_the_rates_follow_the_rl_steps():
    """A third of the rate in the first step, as two of four are warm-up; the critic's is constant."""
    batch, turns = by_turn("window", 10)
    used = -(-turns // 10)
    assert 1 < used < batch.rows.size
    plain = batch._replace(rows=batch.rows[:used], **{k: x[:used] for k, x in batch.by_row()._asdict().items() if x is not None})
    config, hyper = tiny.learner("ppo+epo")
    config = dataclasses.replace(config, episode_policy_tokens=4 * tiny.TURNS)
    constant = dataclasses.replace(config.optim, schedule="constant")
    by_step = dataclasses.replace(config.optim, updates=4, warmup_ratio=0.5, schedule="step")
    results = []
    for optim, lr, packed in ((by_step, 1.0, batch), (constant, 1 / 3, batch), (constant, 1 / 3, plain)):
        learner = dataclasses.replace(config, optim=optim, critic_optim=constant)
        state, metrics = make_train_step(learner)(tiny.start(learner), packed, hyper._replace(lr=np.float32(lr)))
        assert metrics["updates"] == used and metrics["skipped_updates"] == 0
        results.append((state.params, state.critic))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), results[0], other)


@pytest.mark.parametrize("style", ["chat", "window"])
def test_a_second_epoch_trains_on_what_was_known_before_the_first(style):
    """Two epochs of one mini-batch each: with the rows of the second in another order as with the same rows."""
    trajectories = tiny.episodes(0)
    if style == "window":
        trajectories = [split(t) for t in trajectories]
    config, hyper = tiny.learner("ppo+epo", kl="none")
    config = dataclasses.replace(config, epochs=2, episode_policy_tokens=12 if style == "window" else None)
    step, same = make_train_step(config), np.arange(tiny.EPISODES)
    shape = BatchShape(tiny.ROW, tiny.POLICY, tiny.TURNS, 1, 2, contexts=tiny.TURNS if style == "window" else 1)
    found = []
    for second in (same, same[::-1]):
        order = np.stack([same, second])
        batch = pack(trajectories, shape, order)
        assert batch.rows.size == 2
        found.append(step(tiny.start(config, critic=tiny.critic()), batch, hyper))
    (state, metrics), (other, others_metrics) = found
    assert metrics["updates"] == 2
    for name, value in metrics.items():
        assert others_metrics[name] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
    # At a rate of 1e-2. Adam divides a gradient by its own size, so where that is near 0, its rounding is a share of the rate.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-4), state.params, other.params)
    # The second update's ratios are those to the policy before the first.
    assert metrics["ratio_max"] > 1.0 + 1e-3


def recomputes(**changes):
    config = base_config("toy")
    config.model.dtype = "float32"
    for key, value in changes.items():
        section, leaf = key.split("__")
        config[section][leaf] = value
    return objective_and_hyper(config)[0].own_old_log_prob


def test_off_float32_the_learner_recomputes_the_log_probabilities_before_the_update():
    assert not recomputes()
    for changes in (
        {"model__dtype": "bfloat16"}, {"rollout__dtype": "bfloat16"}, {"rollout__cache_dtype": "int8"},
        {"algo__old_log_prob": "learner"}, {"algo__importance_cap": 2.0},
    ):  # fmt: skip
        assert recomputes(**changes), changes
    assert not recomputes(model__dtype="bfloat16", algo__old_log_prob="sampler")


def test_ratios_begin_at_one_whatever_the_sampler_recorded():
    """A record that is off by 0.3 nats: with the learner's own log-probabilities no ratio leaves 1 before the update, and the
    gap is a metric."""
    trajectories = tiny.episodes(0)
    for t in trajectories:
        t.log_prob = [x - 0.3 if turn >= 0 else 0.0 for x, turn in zip(t.log_prob, t.turn, strict=True)]
    batch = tiny.batched(trajectories, 1)
    _, metrics = tiny.first_update(*tiny.learner("grpo", kl="none", recompute_old_log_prob=True), batch)
    np.testing.assert_allclose([metrics["ratio_min"], metrics["ratio_max"]], 1.0, atol=1e-5)
    np.testing.assert_allclose([metrics["sampler_gap_mean"], metrics["sampler_gap_max"]], 0.3, atol=1e-5)
    _, recorded = tiny.first_update(*tiny.learner("grpo", kl="none"), batch)
    assert recorded["ratio_max"] == pytest.approx(np.exp(0.3), rel=1e-4)


def test_the_learners_entropy_and_its_change_are_logged():
    """Of two mini-batches, the second's entropy is that after the first's update."""
    config, hyper = tiny.learner("grpo+epo", kl="none", lam=50.0)
    batch = tiny.batched(tiny.episodes(0), 2)
    _, metrics = tiny.program(config, 2)(tiny.start(config), batch, hyper)
    assert metrics["entropy_change"] > 1e-3  # a bonus of that weight raises it
    assert metrics["entropy"] == pytest.approx(float(metrics["behaviour_entropy"] + metrics["entropy_change"] / 2), abs=2e-2)
    _, alone = tiny.program(config)(tiny.start(config), tiny.batched(tiny.episodes(0), 1), hyper)
    assert abs(alone["entropy_change"]) < 1e-5
