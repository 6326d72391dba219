"""One update of the arms `+released` against the release's functions, called as the release calls them: on turn rows, a
micro-batch at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from epo_jax.common import keys
from epo_jax.objectives import entropy
from epo_jax.parity import released, released_rows
from epo_jax.settings.config import base_config
from epo_jax.training.from_config import learner_config
from epo_jax.training.optim import OptimConfig, stuck
from tests import tiny
from tests.parity import actor

LENGTH, GATE = 4, tiny.TURNS // 2
PAST = [0.0, 2.0, 2.4]  # one earlier step, which ended after two turns
SETTINGS = {"lam": 0.3, "alpha": 0.7, "kappa_l": 0.9, "kappa_r": 1.1, "kl_coef": 0.2, "format_penalty": 0.5}


@functools.cache
def problem():
    trajectories = tiny.episodes(3)
    return trajectories, tiny.batched(trajectories, 1)


def turn_table(trajectories, batch):
    """Every turn: (trajectory, turn, places [n, 2] of its tokens in the packed rows), in the order of collection."""
    table = []
    for i, t in enumerate(trajectories):
        for u in range(len(t.actions)):
            here = (batch.policy_mask[0] > 0) & (batch.trajectory[0] == i) & (batch.turn[0] == u)
            table.append((i, u, np.argwhere(here)))
    return table


def copied_turns(table, step, mini_turns):
    """The turns that the step copied, as indices into `table`; that they are drawn rightly is `test_released_rows`'s."""
    tokens = np.zeros(tiny.EPISODES * tiny.TURNS, np.int32)
    for i, u, places in table:
        tokens[i * tiny.TURNS + u] = len(places)
    key = jax.random.fold_in(keys.key(0, "learner"), step)
    rows = released_rows.turn_rows(jnp.asarray(tokens), mini_turns, 5, key)
    index = {i * tiny.TURNS + u: row for row, (i, u, _) in enumerate(table)}
    return [index[int(k)] for k in rows.key[rows.live > 0]][len(table) :]


def padded(field, rows):
    """[B, L] of a packed [R, P] field; zeros beyond each turn's end."""
    return jnp.stack([jnp.zeros(LENGTH).at[: len(p)].set(field[p[:, 0], p[:, 1]]) for _, _, p in rows])


def row_advantages(base, trajectories, rows, values, mask):
    rewards = np.zeros((len(rows), LENGTH), np.float32)
    for r, (i, u, places) in enumerate(rows):
        t = trajectories[i]
        rewards[r, len(places) - 1] = sum(t.rewards) - SETTINGS["format_penalty"] * (not t.valid[u])
    episode = jnp.array([i for i, _, _ in rows])
    group = jnp.array([trajectories[i].group for i, _, _ in rows])
    match base:
        case "ppo":
            return released.gae(jnp.asarray(rewards), values * mask, mask, 1.0, 1.0)[0]
        case "reinforce_pp":
            return released.reinforce_pp(jnp.asarray(rewards), mask, 1.0)[0]
        case "gigpo":
            names = [(trajectories[i].group, trajectories[i].observations[u]) for i, u, _ in rows]
            anchor = jnp.array([names.index(name) for name in names])
            to_come = jnp.array([sum(trajectories[i].rewards[u:]) for i, u, _ in rows])
            return released.gigpo(jnp.asarray(rewards), to_come, mask, anchor, group, episode, 1.0, False)
    name = "grpo" if base == "dr_grpo" else base
    return released.outcome_advantage(name, jnp.asarray(rewards), mask, group, episode, normalize=base == "grpo")


@pytest.mark.parametrize("base", ["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gigpo", "ppo"])
def test_an_update_is_the_releases(base):
    trajectories, batch = problem()
    config, hyper = tiny.learner(f"{base}+released", **SETTINGS)
    numbers = jax.tree.map(jnp.asarray, hyper)
    history = entropy.append(entropy.init_history(4, tiny.TURNS), jnp.array(PAST), jnp.ones(tiny.TURNS))
    state = {"history": history, "reference": tiny.as_params(tiny.parameters(1)), "step": jnp.int32(1)}
    gradient, metrics = tiny.first_update(config, hyper, batch, **state)

    table = turn_table(trajectories, batch)
    copies = copied_turns(table, 1, tiny.OBJECTIVE.mini_turns)
    rows = table + [table[c] for c in copies]
    assert copies and len(rows) % 5 == 0, "the batch needs no copies: choose another"
    inputs, mask = tiny.inputs(batch), padded(batch.policy_mask[0], rows)
    # A fresh critic says 0 everywhere.
    advantage = row_advantages(base, trajectories, rows, jnp.zeros_like(mask), mask)
    turn = jnp.array([u for _, u, _ in rows])
    by_turn = [np.concatenate([batch.behaviour_entropy[0][p[:, 0], p[:, 1]] for _, u, p in table if u == t]).mean()
               for t in range(tiny.TURNS)]  # fmt: skip
    center = jnp.mean(jnp.array([PAST, by_turn]), axis=0)
    reference = tiny.own_statistics(batch, tiny.parameters(1))[0]
    penalty = actor.PenaltyConfig(1.0, 0.9, 1.1, 0.7, "token", GATE)

    def loss(params):
        log_p = tiny.dense_log_p(params, inputs)
        chosen = jnp.take_along_axis(log_p, inputs.label[..., None], -1)[..., 0]
        fields = (chosen, -(jnp.exp(log_p) * log_p).sum(-1), jnp.asarray(batch.behaviour_log_prob[0]), reference)
        columns = [padded(field, rows) for field in fields]
        micro = [
            actor.actor_loss(*(x[s] for x in (*columns, advantage, mask, turn)), center, 1, numbers, "token-mean", "k3",
                                penalty, True)[0]
            for s in (slice(i, i + 5) for i in range(0, len(rows), 5))
        ]  # fmt: skip
        return jnp.stack(micro).mean()

    value, expected = jax.jit(jax.value_and_grad(loss))(tiny.as_params())
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), gradient, expected)


def own_advantages(trajectories, rows, places, mask, old_value):
    """(advantages, returns) as the release has them: GRPO, where every turn row of a group, copies among them, is one more
    sample; with a critic's values, PPO, where every row ends with the episode's return and all rows are whitened together."""
    score = np.array([sum(trajectories[i].rewards) - 0.5 * (not trajectories[i].valid[u]) for i, u, _ in rows])
    if old_value is None:
        group = np.array([trajectories[i].group for i, _, _ in rows])
        members = [score[group == g] for g in group]
        row = [(s - m.mean()) / (m.std(ddof=1) + 1e-6) for s, m in zip(score, members, strict=True)]
        return np.array(row)[:, None] * mask, None
    raw = score[:, None] - old_value[places[..., 0], places[..., 1]]
    tokens = raw[mask > 0]
    return (raw - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8) * mask, score[:, None] * mask


def micro_batch_loss(params, inputs, old, reference, advantage, mask, places):
    """The release's actor loss of one micro-batch of turn rows, without the penalty, which is a constant."""
    log_p = tiny.dense_log_p(params, inputs)
    here = places[..., 0], places[..., 1]
    chosen = jnp.take_along_axis(log_p, inputs.label[..., None], -1)[..., 0][here]
    uncertain = -(jnp.exp(log_p) * log_p).sum(-1)[here]
    ratio = jnp.exp(chosen - old[here])
    clipped = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 0.8, 1.2))
    policy = jnp.where(advantage < 0, jnp.minimum(clipped, -3.0 * advantage), clipped)
    gap = reference[here] - chosen
    token = policy - 0.3 * uncertain + 0.2 * jnp.clip(jnp.exp(gap) - gap - 1.0, -10.0, 10.0)
    return (token * mask).sum() / mask.sum()


def value_slope(value, old_value, returns, mask, places, clip):
    """The gradient by the values [R, P] of the release's critic loss of one micro-batch of turn rows."""
    here = places[mask > 0][:, 0], places[mask > 0][:, 1]
    v, old, want = value[here], old_value[here], returns[mask > 0]
    kept = np.clip(v, old - clip, old + clip)
    slope = np.zeros(value.shape)
    np.add.at(slope, here, np.where((kept - want) ** 2 > (v - want) ** 2, 0.0, 2.0 * (v - want)) / mask.sum())
    return slope


@pytest.mark.parametrize("base", ["grpo", "ppo"])
def test_three_steps_are_the_releases(base):
    """Three RL steps of three mini-batches: the release's loop over rows, its AdamW and its schedule written out, in
    float64 but for the model. The rate is 0 in the first step, the whole in the second, and one for all its updates; the
    critic's is the same in all."""
    mini_turns, micro_turns, peak, critic_rate, steps = 10, 5, 1e-2, 3e-3, 4
    trajectories, batch = problem()
    settings = SETTINGS | {"value_clip": 0.1, "critic_lr": critic_rate}
    config, hyper = tiny.learner(f"{base}+released", **settings, mini_turns=mini_turns)
    optim = OptimConfig(peak, steps, warmup_ratio=0.3, clip_norm=0.05, schedule="constant")
    critic = {}
    if base == "ppo":
        critic_optim = learner_config(base_config("toy"), tiny.MODEL, config.objective).critic_optim
        config, critic = dataclasses.replace(config, critic_optim=critic_optim), {"critic": tiny.critic()}
        judge = tiny.AdamW(critic["critic"], critic_optim.clip_norm)
    config = dataclasses.replace(config, optim=optim)
    state = tiny.start(config, reference=tiny.as_params(tiny.parameters(1)), **critic)
    for _ in range(3):
        state, metrics = tiny.program(config)(state, batch, hyper)
    # There is room for a fourth mini-batch, which has no rows; that is no failure.
    assert metrics["updates"] == 3 and metrics["skipped_updates"] == 0 and not stuck(metrics)

    inputs, old = tiny.inputs(batch), jnp.asarray(batch.behaviour_log_prob[0])
    reference = tiny.own_statistics(batch, tiny.parameters(1))[0]
    gradient_of = jax.jit(jax.grad(micro_batch_loss))
    table = turn_table(trajectories, batch)
    actor, old_value = tiny.AdamW(tiny.as_params(), 0.05), None
    begun = actor.vector
    for rl_step in range(3):
        rate = peak * (0.0, 1.0, 0.6 + 0.4 * np.cos(np.pi / 3))[rl_step]
        rows = table + [table[c] for c in copied_turns(table, rl_step, mini_turns)]
        assert len(table) > 2 * mini_turns and len(table) % mini_turns and len(rows) == 3 * mini_turns
        places, mask = np.zeros((len(rows), LENGTH, 2), int), np.zeros((len(rows), LENGTH))
        for r, (_, _, where) in enumerate(rows):
            places[r, : len(where)], mask[r, : len(where)] = where, 1.0
        if critic:
            old_value = np.asarray(tiny.dense_values(judge.params(), inputs), np.float64)
        advantage, returns = own_advantages(trajectories, rows, places, mask, old_value)
        for start in range(0, len(rows), mini_turns):
            gradient, slope = 0.0, 0.0
            if critic:
                value, back = jax.vjp(lambda critic: tiny.dense_values(critic, inputs), judge.params())
            for micro in (slice(i, i + micro_turns) for i in range(start, start + mini_turns, micro_turns)):
                columns = (jnp.asarray(x[micro], jnp.float32) for x in (advantage, mask))
                found = gradient_of(actor.params(), inputs, old, reference, *columns, places[micro])
                gradient += np.asarray(ravel_pytree(found)[0], np.float64) / (mini_turns // micro_turns)
                if critic:
                    part = value_slope(np.asarray(value, np.float64), old_value, returns[micro], mask[micro], places[micro], 0.1)
                    slope += part / (mini_turns // micro_turns)
            assert actor.update(gradient, rate) > 0.05, "nothing is clipped: choose a lower bound"
            if critic:
                judge.update(ravel_pytree(back(jnp.asarray(slope, jnp.float32)))[0], critic_rate)
    moved = np.abs(np.asarray(ravel_pytree(state.params)[0]) - begun)
    assert np.median(moved) > 1e-2
    np.testing.assert_allclose(ravel_pytree(state.params)[0], actor.vector, atol=1e-4)
    if critic:
        assert metrics["value_clip_fraction"] > 0
        off = np.abs(ravel_pytree(state.critic)[0] - judge.vector)
        # AdamW makes much of the rounding of a gradient that is nearly 0, but no more than a tenth of one update.
        assert np.quantile(off, 0.998) < 2e-5 and off.max() < 3e-4


def test_an_update_without_a_finite_gradient_is_left_out():
    trajectories, batch = problem()
    config, hyper = tiny.learner("grpo+released", **SETTINGS)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_ratio=0.0, schedule="constant"))
    before = tiny.as_params()
    state, metrics = tiny.program(config)(tiny.start(config), batch, hyper._replace(lam=np.float32(np.nan)))
    assert metrics["updates"] == metrics["skipped_updates"] == 1 and stuck(metrics)
    jax.tree.map(np.testing.assert_array_equal, state.params, before)
