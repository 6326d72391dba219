"""One update of the arms `+released` against the release's functions, called as the release calls them: on turn rows, a
micro-batch at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.objectives import entropy, released, released_rows
from tests import tiny

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


def copied_turns(batch, table, step):
    """The turns that the step copied, as indices into `table`; that they are drawn rightly is `test_released_rows`'s."""
    tokens = np.zeros(tiny.EPISODES * tiny.TURNS, np.int32)
    for i, u, places in table:
        tokens[i * tiny.TURNS + u] = len(places)
    key = jax.random.fold_in(jax.random.key(0), step)
    rows = released_rows.turn_rows(jnp.asarray(tokens), jnp.zeros(tokens.size, jnp.int32), 1, 5, key)
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
    return released.outcome_advantage(name, jnp.asarray(rewards), mask, group, episode, normalise=base == "grpo")


@pytest.mark.parametrize("base", ["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gigpo", "ppo"])
def test_an_update_is_the_releases(base):
    trajectories, batch = problem()
    config, hyper = tiny.learner(f"{base}+released", **SETTINGS)
    numbers = jax.tree.map(jnp.asarray, hyper)
    history = entropy.append(entropy.init_history(4, tiny.TURNS), jnp.array(PAST), jnp.ones(tiny.TURNS))
    state = {"history": history, "reference": tiny.as_params(tiny.parameters(1)), "step": jnp.int32(1)}
    gradient, metrics = tiny.first_update(config, hyper, batch, **state)

    table = turn_table(trajectories, batch)
    copies = copied_turns(batch, table, 1)
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
    penalty = released.PenaltyConfig(1.0, 0.9, 1.1, 0.7, "token", GATE)

    def loss(params):
        log_p = tiny.dense_log_p(params, inputs)
        chosen = jnp.take_along_axis(log_p, inputs.label[..., None], -1)[..., 0]
        fields = (chosen, -(jnp.exp(log_p) * log_p).sum(-1), jnp.asarray(batch.behaviour_log_prob[0]), reference)
        columns = [padded(field, rows) for field in fields]
        micro = [
            released.actor_loss(*(x[s] for x in (*columns, advantage, mask, turn)), center, 1, numbers, "token-mean", "k3",
                                penalty, True)[0]
            for s in (slice(i, i + 5) for i in range(0, len(rows), 5))
        ]  # fmt: skip
        return jnp.stack(micro).mean()

    value, expected = jax.jit(jax.value_and_grad(loss), compiler_options=tiny.QUICK)(tiny.as_params())
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), gradient, expected)
