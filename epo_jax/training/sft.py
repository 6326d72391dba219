"""The warm start: behavior cloning on expert episodes.

Without it, RL on a sparse reward begins with no success.

Expert episodes get the prompts of a rollout (`prompts.next_prompt`), in the same token batches. The loss is the cross-entropy of
the action tokens plus, at a smaller weight, that of the prompts, from which a model trained from scratch learns the language of
the game. Mistakes of an expert are context only: no term of the loss predicts them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from epo_jax.common import keys
from epo_jax.envs import agent
from epo_jax.envs.base import Demonstration, Observation
from epo_jax.models.decoder import DecoderConfig, Params, bind, param_axes
from epo_jax.models.tokenizer import ChatTokenizer
from epo_jax.objectives.batch import TokenBatch
from epo_jax.parallel import mesh
from epo_jax.rollout.packing import BatchShape, pack
from epo_jax.rollout.prompts import RolloutConfig, next_prompt
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.training.optim import OptimConfig, like_parameters, make_optimizer
from epo_jax.training.policy_tokens import head_statistics


def transcript(demonstration: Demonstration, style: str, window: agent.Window | None = None) -> list[tuple[str, str]]:
    """The (message, answer) pairs of an expert episode, uncut."""
    first = demonstration.observations[0]
    return [
        (agent.message(first, history, observation, style, window), answer)
        for history, observation, answer in _turns(demonstration, style)
    ]


def to_trajectory(demonstration: Demonstration, tokenizer: ChatTokenizer, config: RolloutConfig) -> Trajectory:
    """An expert episode as a trajectory; its answers are policy tokens.

    Turns with a mistake are not valid. The prompts are those of a rollout with `config` whose policy gives these answers; turns
    beyond the limits of a rollout are kept.
    """
    trajectory = Trajectory(task=demonstration.task, won=demonstration.won)
    first = demonstration.observations[0]
    for turn, (history, observation, answer) in enumerate(_turns(demonstration, config.style, tokenizer.frame.opened)):
        prompt = next_prompt(tokenizer, config, first, history, observation, tokenizer.stop_id)
        trajectory.append_prompt(prompt, new_context=config.window is not None or turn == 0)
        ids = tokenizer.answer(answer)
        trajectory.append_answer(ids, [0.0] * len(ids), [0.0] * len(ids))
        trajectory.actions.append(demonstration.actions[turn])
        trajectory.rewards.append(0.0)
        trajectory.valid.append(turn not in demonstration.mistakes)
    return trajectory


def _turns(
    demonstration: Demonstration, style: str, opened: str = ""
) -> Iterator[tuple[list[tuple[str, str]], Observation, str]]:
    """(history, observation, answer after the text that its prompt `opened`) of every turn.

    A history has actions as they are parsed from answers.
    """
    history = []
    for observation, action in zip(demonstration.observations, demonstration.actions, strict=False):
        answer = agent.expert_answer(action, style, opened)
        yield history, observation, answer
        history.append((observation.text, agent.parse_action(answer, style == "tagged", opened).action))


def cloning_loss(
    model: DecoderConfig, params: Params, batch: TokenBatch, prompt_weight: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(loss, mean cross-entropy of the action tokens), nats, over rows without the leading mini-batch axis.

    Answers that are not valid (mistakes of an expert) are neither actions nor prompts: their weight is 0.
    """
    module = bind(model, params)
    hidden = module(batch.tokens, batch.positions, batch.segment_ids)
    labels = jnp.roll(batch.tokens, -1, axis=1)
    # A position predicts the next token of its own segment, or nothing.
    follows = (jnp.roll(batch.segment_ids, -1, axis=1) == batch.segment_ids) & (batch.segment_ids > 0)
    follows = follows.at[:, -1].set(False).astype(jnp.float32)
    rows = jnp.arange(labels.shape[0])[:, None]
    answer, action = (
        jnp.zeros_like(follows).at[rows, batch.index].max(x) for x in (batch.policy_mask, batch.policy_mask * batch.valid)
    )
    head = mesh.at_use(module.output_embedding(), "vocab", "embed")
    log_prob, _ = head_statistics(model, hidden.reshape(-1, hidden.shape[-1]), head, labels, 1.0, None)
    prompt = follows * (1.0 - answer)
    on_actions = -(log_prob * action).sum() / jnp.maximum(action.sum(), 1.0)
    on_prompts = -(log_prob * prompt).sum() / jnp.maximum(prompt.sum(), 1.0)
    return on_actions + prompt_weight * on_prompts, on_actions


@functools.cache
def make_cloning_step(
    model: DecoderConfig, optim: OptimConfig, prompt_weight: float, on: jax.sharding.Mesh | None = None
) -> Callable:
    """The jitted cloning update, over the devices of a mesh.

    (params, opt_state, rows) -> (params, opt_state, cross-entropy of the action tokens in nats); the first two are donated.
    """
    optimizer, axes = make_optimizer(optim), param_axes(model)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, rows):
        with mesh.inside(on):
            gradient, on_actions = jax.grad(lambda p: cloning_loss(model, p, rows, prompt_weight), has_aux=True)(params)
            updates, opt_state = optimizer.update(mesh.as_stored(gradient, axes), opt_state, params)
            params = mesh.as_stored(optax.apply_updates(params, updates), axes)
            of_state = like_parameters(optim, opt_state, axes, lambda x: (None,) * x.ndim)
            return params, mesh.as_stored(opt_state, of_state), on_actions

    return step


class Cloning(NamedTuple):
    """A warm start after `updates` updates.

    `cross_entropy` is that of the action tokens in the last update, nats.
    """

    params: Params
    opt_state: optax.OptState
    updates: int
    cross_entropy: float = 0.0


def warm_start(
    params: Params,
    trajectories: list[Trajectory],
    model: DecoderConfig,
    optim: OptimConfig,
    row_tokens: int,
    rows_per_step: int,
    prompt_weight: float,
    seed: int,
    begun: Cloning | None = None,
) -> Iterator[Cloning]:
    """Clones the experts; yields the state after each of `optim.updates` updates.

    An update is on `rows_per_step` packed rows. On a mesh, empty rows fill the batch to a multiple of `row_shards`; their weight
    is 0, so that the result is the same. The yielded arrays are donated to the next update: keep only the last.

    Args:
        begun: the state that an earlier process saved, from which this one continues exactly.
    """
    shape = BatchShape(
        row_tokens,
        row_tokens,
        max_turns=max(len(t.actions) for t in trajectories),
        contexts=max(len(t.contexts) for t in trajectories),
        contexts_per_row=row_tokens // max(t.longest_context for t in trajectories),
    )
    packed = pack(trajectories, shape)
    pool = jax.tree.map(lambda x: x[0, : packed.rows[0]], packed.by_row())
    number = len(pool.tokens)
    pool = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])]), pool)  # the last row is empty
    on = mesh.mesh_of(params)
    empty = [number] * (-rows_per_step % (mesh.row_shards(on) if on else 1))
    step = make_cloning_step(model, optim, prompt_weight, on)
    opt_state, first = make_optimizer(optim).init(params), 0
    if begun is not None:
        params, opt_state, first = begun.params, begun.opt_state, begun.updates
    rng = keys.generator(seed, "warm start")
    deck = np.zeros(0, np.int64)
    for update in range(optim.updates):
        while len(deck) < rows_per_step:
            deck = np.concatenate([deck, rng.permutation(number)])
        chosen, deck = deck[:rows_per_step], deck[rows_per_step:]
        if update >= first:
            rows = np.append(chosen, empty).astype(np.int64)
            params, opt_state, cross_entropy = step(params, opt_state, jax.tree.map(lambda x, r=rows: x[r], pool))
            yield Cloning(params, opt_state, update + 1, float(cross_entropy))
