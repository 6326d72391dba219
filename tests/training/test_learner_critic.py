"""RL steps of PPO with EPO and a critic against the same written out: the objective, both optimisers and their rates in float64,
as loops over episodes, and the model in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from epo_jax.training.optim import OptimConfig
from tests import rounding, tiny
from tests.objectives import transcription

STEPS, MINIS = 3, 2
SETTINGS = {
    "lam": 0.3, "alpha": 0.7, "kappa_l": 0.9, "kappa_r": 1.02, "kl_coef": 0.2, "format_penalty": 0.5, "discount": 0.9,
    "gae_lambda": 0.8, "value_clip": 0.1, "value_coef": 0.7, "clip_low": 0.02, "clip_high": 0.03,
}  # fmt: skip
OPTIM = OptimConfig(4e-3, STEPS * MINIS, warmup_ratio=0.4, clip_norm=0.3)
CRITIC_OPTIM = dataclasses.replace(OPTIM, lr=1e-2, clip_norm=2.0)


@jax.jit
def policy(params, rows):
    log_p = tiny.dense_log_p(params, rows)
    return jnp.take_along_axis(log_p, rows.label[..., None], -1)[..., 0], -(jnp.exp(log_p) * log_p).sum(-1)


def rate(config, update):
    """Of an update, counted from 0."""
    warmup = int(config.warmup_ratio * config.updates)
    if update < warmup:
        return config.lr * (update + 1) / (warmup + 1)
    progress = (update - warmup) / (config.updates - warmup)
    return config.lr * (0.2 + 0.8 * (1 + np.cos(np.pi * progress)) / 2)


def test_three_steps_of_ppo_with_a_critic_written_out_in_float64():
    config, hyper = tiny.learner("ppo+epo", **SETTINGS)
    config = dataclasses.replace(config, optim=OPTIM, critic_optim=CRITIC_OPTIM, total_steps=STEPS + 1)
    reference = tiny.as_params(tiny.parameters(1))
    critic = tiny.critic()
    state = tiny.start(config, **jax.tree.map(jnp.copy, {"reference": reference, "critic": critic}))
    actor, judge, past = tiny.AdamW(tiny.as_params(), OPTIM.clip_norm), tiny.AdamW(critic, CRITIC_OPTIM.clip_norm), []
    begun = actor.vector, judge.vector
    for step in range(STEPS):
        trajectories = tiny.episodes(step)
        batch = tiny.batched(trajectories, MINIS)
        state, metrics = tiny.program(config, MINIS)(state, batch, hyper)
        expected = written_out(trajectories, batch, reference, actor, judge, np.array(past).reshape(-1, 1), step, config, hyper)
        past.append(batch.behaviour_entropy[batch.policy_mask > 0].mean(dtype=np.float64))
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
        assert metrics["updates"] == MINIS and metrics["skipped_updates"] == 0
    assert metrics["clip_fraction"] > 0 and metrics["value_clip_fraction"] > 0 and metrics["outside_corridor"] > 0
    for start, want, found, most in zip(begun, (actor, judge), (state.params, state.critic), (2e-5, 1e-4), strict=True):
        assert np.median(np.abs(want.vector - start)) > 1e-3
        off = np.abs(ravel_pytree(found)[0] - want.vector)
        assert np.quantile(off, 0.998) < most
        # Adam divides by a gradient's size: where the tokens' gradients cancel, it magnifies their rounding.
        assert (off < rounding.bound(batch.policy_mask[0].sum(), 1.0) * want.reach + rounding.EPS * np.abs(want.vector)).all()


def written_out(trajectories, batch, reference, actor, judge, past, step, config, hyper):
    """Moves `actor` and `judge` by one RL step; the metrics of its updates."""
    rows = [tiny.inputs(batch, m) for m in range(MINIS)]
    ref = [policy(reference, r)[0] for r in rows]
    old_value = [np.asarray(tiny.dense_values(judge.params(), r), np.float64) for r in rows]
    where = {
        i: (m, *np.nonzero((batch.policy_mask[m] > 0) & (batch.trajectory[m] == i)))
        for i in range(tiny.EPISODES) for m in range(MINIS) if (batch.policy_mask[m] * (batch.trajectory[m] == i)).any()
    }  # fmt: skip
    advantage, target = {}, {}
    for i, (m, *here) in where.items():
        turn, t = batch.turn[m][*here], trajectories[i]
        reward = np.zeros(turn.size)
        for u, amount in enumerate(t.rewards):
            reward[np.flatnonzero(turn == u)[-1]] = amount
        advantage[i] = transcription.gae(reward, old_value[m][*here], hyper.discount, hyper.gae_lambda)
        target[i] = advantage[i] + old_value[m][*here]
    everything = np.concatenate(list(advantage.values()))
    for i, (m, *here) in where.items():
        invalid = 1.0 - np.array(trajectories[i].valid)[batch.turn[m][*here]]
        whitened = (advantage[i] - everything.mean()) / np.sqrt(everything.var(ddof=1) + 1e-8)
        advantage[i] = whitened - hyper.format_penalty * invalid

    told = []
    for m in range(MINIS):
        own = [i for i in where if where[i][0] == m]
        place = tuple(np.concatenate([where[i][a] for i in own]) for a in (1, 2))
        (log_prob, uncertain), back = jax.vjp(lambda params, m=m: policy(params, rows[m]), actor.params())
        episodes = [
            {"mask": np.ones(here[0].size)} | {
                name: np.asarray(x[here], x.dtype if name == "turn" else np.float64)
                for name, x in (
                    ("turn", batch.turn[m]), ("old_log_prob", batch.behaviour_log_prob[m]), ("ref_log_prob", np.asarray(ref[m])),
                    ("old_entropy", batch.behaviour_entropy[m]), ("log_prob", np.asarray(log_prob)),
                    ("entropy", np.asarray(uncertain)),
                )
            }
            for here in (where[i][1:] for i in own)
        ]  # fmt: skip
        loss, by_token = transcription.value_and_gradients(
            episodes, [advantage[i] for i in own], hyper, config.objective, past, step, config.total_steps
        )
        spread = [jnp.zeros(log_prob.shape).at[place].set(jnp.asarray(g, jnp.float32)) for g in by_token]

        value, back_of_value = jax.vjp(lambda critic, m=m: tiny.dense_values(critic, rows[m]), judge.params())
        v, old, want = np.asarray(value, np.float64)[place], old_value[m][place], np.concatenate([target[i] for i in own])
        kept = np.clip(v, old - hyper.value_clip, old + hyper.value_clip)
        plain, clipped = (v - want) ** 2, (kept - want) ** 2
        slope = np.where(clipped > plain, 0.0, hyper.value_coef * 2.0 * (v - want)) / v.size
        value_slope = jnp.zeros(value.shape).at[place].set(jnp.asarray(slope, jnp.float32))

        norm = actor.update(ravel_pytree(back(tuple(spread)))[0], rate(OPTIM, step * MINIS + m))
        judge.update(ravel_pytree(back_of_value(value_slope))[0], rate(CRITIC_OPTIM, step * MINIS + m))
        told.append((loss, norm, hyper.value_coef * np.maximum(plain, clipped).mean(), (clipped > plain).mean()))
    return dict(zip(("loss", "grad_norm", "value_loss", "value_clip_fraction"), np.mean(told, axis=0), strict=True))
