"""The warm start: experts become the token batches that the learner trains on, and the loss is the cross-entropy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from epo_jax import sft
from epo_jax.envs import toy
from epo_jax.models.decoder import DecoderConfig, bind, init_params
from epo_jax.models.tokenizer import train_tokenizer
from epo_jax.optim import OptimConfig
from epo_jax.trajectory import pack

DEMONSTRATIONS = toy.demonstrations(toy.list_tasks("train", {}), {})
TOKENIZER = train_tokenizer([t for d in DEMONSTRATIONS for pair in sft.transcript(d, "bare") for t in pair], 400)
MODEL = DecoderConfig(TOKENIZER.vocab_size, 16, 1, 2, 1, 8, 16)


def test_only_the_answers_are_policy_tokens():
    demonstration = DEMONSTRATIONS[4]
    trajectory = sft.to_trajectory(demonstration, TOKENIZER, "bare")
    said = [TOKENIZER.decode([i for i, t in zip(trajectory.tokens, trajectory.turn, strict=True) if t == turn])
            for turn in range(2)]  # fmt: skip
    assert tuple(said) == demonstration.actions
    assert demonstration.observations[0] in TOKENIZER.decode(trajectory.tokens)
    assert demonstration.goal in TOKENIZER.decode(trajectory.tokens)


def test_mistakes_are_read_and_not_imitated():
    sound = sft.to_trajectory(DEMONSTRATIONS[4], TOKENIZER, "bare")
    erring = sft.to_trajectory(dataclasses.replace(DEMONSTRATIONS[4], mistakes=(0,)), TOKENIZER, "bare")
    assert erring.tokens == sound.tokens and set(sound.turn) == {-1, 0, 1}
    assert erring.turn == [-1 if turn == 0 else turn for turn in sound.turn]


def test_the_loss_is_the_cross_entropy_of_actions_plus_weighted_prompts():
    trajectories = [sft.to_trajectory(d, TOKENIZER, "bare") for d in DEMONSTRATIONS[:5]]
    params = init_params(MODEL, jax.random.key(0))
    on_actions, on_prompts = [], []
    for t in trajectories:
        tokens = jnp.asarray(t.tokens)[None]
        hidden = bind(MODEL, params)(tokens, jnp.arange(tokens.size)[None], jnp.ones_like(tokens))[0]
        log_probs = jax.nn.log_softmax(hidden @ params["embedding"].T)[jnp.arange(tokens.size - 1), tokens[0, 1:]]
        for log_prob, turn in zip(log_probs, t.turn[1:], strict=True):
            (on_actions if turn >= 0 else on_prompts).append(-float(log_prob))
    packed = pack(trajectories, 128, 128, 2)
    rows = jax.tree.map(lambda x: jnp.asarray(x[0]), packed._replace(rows=None, returns=None, group=None, anchor=None))
    loss, actions = sft.cloning_loss(MODEL, params, rows, 0.3)
    np.testing.assert_allclose(actions, np.mean(on_actions), rtol=1e-5)
    np.testing.assert_allclose(loss, np.mean(on_actions) + 0.3 * np.mean(on_prompts), rtol=1e-5)


def test_cloning_lowers_the_cross_entropy_and_is_deterministic():
    trajectories = [sft.to_trajectory(d, TOKENIZER, "bare") for d in DEMONSTRATIONS]

    def run():
        params = init_params(MODEL, jax.random.key(0))
        return list(ce for _, ce in sft.warm_start(params, trajectories, MODEL, OptimConfig(1e-2, 30), 128, 4, 0.1, 0))

    curve = run()
    assert curve[-1] < 0.5 * curve[0]
    assert curve == run()
