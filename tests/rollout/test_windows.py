"""Window memory: an episode whose turns are contexts of their own, in rows of their own, is still one episode."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.envs import agent, toy
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models.decoder import DecoderConfig
from epo_jax.models.tokenizer import train_tokenizer
from epo_jax.rollout import prompts
from epo_jax.rollout.collect import Player, collect
from epo_jax.rollout.episode import Episode
from epo_jax.rollout.packing import BatchShape, pack
from epo_jax.training import sft
from epo_jax.training.optim import OptimConfig
from epo_jax.training.state import init_state
from epo_jax.training.step import episode_layout, make_train_step
from tests import tiny

EPISODE_TOKENS = tiny.TURNS * 4
SETTINGS = prompts.RolloutConfig(
    slots=8, max_turns=2, max_tokens=96, max_policy_tokens=16, response_tokens=8, style="bare", window=agent.Window(1)
)


def split(trajectory):
    """The same tokens, each turn a context of its own."""
    speaks = [t >= 0 for t in trajectory.turn]
    starts = [0] + [i for i, (before, now) in enumerate(itertools.pairwise(speaks), start=1) if before and not now]
    return dataclasses.replace(trajectory, starts=starts)


def pack_split(trajectories, mini_batches, rows_multiple=2):
    return pack(trajectories, BatchShape(24, 12, tiny.TURNS, mini_batches, rows_multiple, tiny.TURNS, 2))


def first_metrics(config, hyper, batch):
    return make_train_step(config)(tiny.start(config), batch, hyper)[1]


@pytest.mark.parametrize("arm", ["ppo+epo", "grpo+released"])
def test_turns_in_rows_of_their_own_have_the_advantages_of_the_whole_episode(arm):
    """A discount and a lambda below 1, so that an advantage depends on all that comes after its token."""
    trajectories, mini_batches = tiny.episodes(0), 1 if "released" in arm else 2
    config, hyper = tiny.learner(arm, discount=0.9, gae_lambda=0.8, kl="none", whiten=False)
    hyper = jax.tree.map(np.float32, hyper)
    packed = tiny.batched(trajectories, mini_batches)
    whole = first_metrics(config, hyper, packed)
    windowed = dataclasses.replace(config, episode_policy_tokens=EPISODE_TOKENS)
    batch = pack_split([split(t) for t in trajectories], mini_batches)
    assert batch.rows.sum() > packed.rows.sum()
    apart = first_metrics(windowed, hyper, batch)
    assert whole["advantage_rms"] > 0
    for name in ("advantage_rms", "behaviour_entropy", "corridor_center"):
        np.testing.assert_allclose(apart[name], whole[name], rtol=1e-5)


def test_the_layout_finds_every_token_in_its_order():
    trajectories = [split(t) for t in tiny.episodes(1)]
    batch = pack_split(trajectories, 2)
    layout = episode_layout(*(jnp.asarray(x) for x in (batch.policy_mask, batch.trajectory, batch.turn)))
    table = jnp.full((len(trajectories), EPISODE_TOKENS), -1).at[layout].set(jnp.asarray(batch.label), mode="drop")
    for row, t in zip(table, trajectories, strict=True):
        said = [token for token, turn in zip(t.tokens, t.turn, strict=True) if turn >= 0]
        assert row.tolist() == said + [-1] * (EPISODE_TOKENS - len(said))


def test_the_first_update_has_a_ratio_of_one():
    """Sampled, packed and trained on: with one mini-batch, the ratio to the sampler is 1 at every token."""
    window = SETTINGS.window
    demonstrations = toy.demonstrations(toy.list_tasks("train", {}), {})
    tokenizer = train_tokenizer([t for d in demonstrations for pair in sft.transcript(d, "bare", window) for t in pair], 400)
    model = DecoderConfig(tokenizer.vocab_size, 16, 1, 2, 1, 8, 32)
    params = tiny.init_params(model, jax.random.key(0))
    tasks = toy.list_tasks("train", {})
    episodes = [Episode(i, tasks[i // 4], i // 4) for i in range(12)]
    with EnvPool("toy", {}, 1) as pool:
        player, sampling = Player(episodes, tokenizer, jax.random.key(1)), prompts.SamplingConfig(tiny.TEMPERATURE)
        (sampled,), _ = collect([player], params, pool, model, SETTINGS, sampling)
    config, hyper = tiny.learner("grpo+epo", max_turns=2, turn_tokens=8)
    config = dataclasses.replace(config, model=model, optim=OptimConfig(1e-2, 8), episode_policy_tokens=16)
    batch = pack(sampled, BatchShape(96, 16, 2, 1, 2, 2, 1))
    _, metrics = make_train_step(config)(init_state(config, params), batch, hyper)
    assert abs(metrics["approx_kl"]) < 1e-5 and metrics["clip_fraction"] == 0.0
    np.testing.assert_allclose(metrics["entropy"], metrics["behaviour_entropy"], atol=1e-4)


def test_experts_are_cloned_from_the_same_windows():
    """A warm start with a window shows the agent's own messages, one context a turn."""
    demonstration = toy.demonstrations(toy.list_tasks("train", {})[4:5], {})[0]
    texts = [text for pair in sft.transcript(demonstration, "bare", agent.Window(1)) for text in pair]
    first, second = (observation.text for observation in demonstration.observations[:2])
    assert texts == [
        f"{first}\n{toy.GOAL}", demonstration.actions[0],
        f"{first}\n> {demonstration.actions[0]}\n{second}\n{toy.GOAL}", demonstration.actions[1],
    ]  # fmt: skip
    tokenizer = train_tokenizer(texts, 300)
    t = sft.to_trajectory(demonstration, tokenizer, SETTINGS)
    assert [tokenizer.decode(t.tokens[start:end]) for start, end in t.contexts] == ["".join(texts[:2]), "".join(texts[2:])]
