"""A policy of a few thousand parameters and made-up episodes for it: what the tests of the train step share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from epo_jax.models.decoder import DecoderConfig, bind, init_params
from epo_jax.models.value import init_critic
from epo_jax.objectives import registry
from epo_jax.objectives.batch import TokenBatch
from epo_jax.objectives.spec import Hyper, ObjectiveConfig
from epo_jax.rollout.packing import BatchShape, pack
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.training.optim import OptimConfig
from epo_jax.training.policy_tokens import policy_statistics
from epo_jax.training.state import LearnerConfig, init_state
from epo_jax.training.step import make_train_step

MODEL = DecoderConfig(23, 16, 1, 2, 1, 8, 32)  # 23 words
GROUPS, SIZE, TURNS = 3, 4, 3
EPISODES = GROUPS * SIZE
ROW, POLICY = 48, 24  # tokens and policy tokens of a row
TEMPERATURE = 0.9
RATES = {"lr": 1.0, "critic_lr": 1.0}  # factors of the optimizers' own
OBJECTIVE = ObjectiveConfig(
    num_trajectories=EPISODES, max_turns=TURNS, max_tokens=ROW, turn_tokens=4, mini_turns=40, micro_turns=5
)


@functools.cache
def parameters(seed: int = 0):
    """Flattened, so that no word is certain; entropies still differ from token to token."""
    params = init_params(MODEL, jax.random.key(seed))
    return jax.tree.map(np.asarray, {**params, "embedding": 0.6 * params["embedding"]})


def episodes(seed: int, uniform: tuple[int, ...] = ()) -> list[Trajectory]:
    """Random turns with the log-probabilities and entropies that the policy has there; 0 or 10 for the last turn. Groups
    in `uniform` win every episode, the others the first and not the last."""
    rng, out = np.random.default_rng(seed), []
    for i in range(EPISODES):
        t = Trajectory(task={"id": str(i // SIZE), "type": "t"}, group=i // SIZE, episode=seed * EPISODES + i)
        turns = int(rng.integers(1, TURNS + 1))
        for turn in range(turns):
            t.append_observation("start" if turn == 0 else f"room {rng.integers(2)}")
            t.append_prompt(rng.integers(0, 23, rng.integers(2, 5)).tolist())
            said = rng.integers(0, 23, rng.integers(1, 5)).tolist()
            t.append_answer(said, [0.0] * len(said), [0.0] * len(said))
            t.actions.append("")
            t.valid.append(bool(rng.random() < 0.8))
            won = i // SIZE in uniform or i % SIZE == 0 or (i % SIZE < SIZE - 1 and rng.random() < 0.5)
            t.rewards.append(10.0 * won if turn == turns - 1 else 0.0)
        out.append(t)
    batch = batched(out, 1)
    log_prob, entropy = own_statistics(batch)
    for r in range(int(batch.rows[0])):
        for i in range(EPISODES):
            here = (batch.policy_mask[0, r] > 0) & (batch.trajectory[0, r] == i)
            if here.any():
                said = np.array(out[i].turn) >= 0
                for field, values in (("log_prob", log_prob), ("entropy", entropy)):
                    record = np.zeros(said.size)
                    record[said] = np.asarray(values)[r][here]
                    setattr(out[i], field, record.tolist())
    return out


def batched(trajectories, mini_batches=2, rows_multiple=2):
    return pack(trajectories, BatchShape(ROW, POLICY, TURNS, mini_batches, rows_multiple))


def inputs(batch, mini: int = 0) -> TokenBatch:
    """The rows of one mini-batch."""
    return jax.tree.map(lambda x: jnp.asarray(x[mini]), batch.by_row())


def own_statistics(batch, params=None, mini: int = 0):
    """(log-probability, entropy) of a mini-batch's policy tokens."""
    return policy_statistics(MODEL, as_params(params), inputs(batch, mini), TEMPERATURE)


def as_params(params=None):
    return jax.tree.map(jnp.asarray, parameters() if params is None else params)


def dense_log_p(params, rows: TokenBatch):
    """Log-probabilities of every word at every policy token, [R, P, V]: the logits written out."""
    module = bind(MODEL, params)
    hidden = jnp.take_along_axis(module(rows.tokens, rows.positions, rows.segment_ids), rows.index[..., None], axis=1)
    return jax.nn.log_softmax(jnp.einsum("rpd,vd->rpv", hidden, module.output_embedding()) / TEMPERATURE)


@jax.jit
def dense_values(critic, rows: TokenBatch):
    """The critic's value before every policy token, [R, P]."""
    hidden = bind(MODEL, critic["decoder"])(rows.tokens, rows.positions, rows.segment_ids)
    return jnp.take_along_axis(hidden, rows.index[..., None], axis=1) @ critic["value"]


def critic():
    """One that has opinions already."""
    blank = init_critic("own", as_params(parameters(2)))
    return blank | {"value": jax.random.normal(jax.random.key(3), blank["value"].shape)}


class AdamW:
    """The optimiser written out in float64, for all parameters as one `vector`.

    `reach`: by how much each parameter moves for an error in its gradients of the size of the largest one.
    """

    def __init__(self, params, clip_norm: float):
        start, self.unravel = ravel_pytree(params)
        self.vector, self.clip_norm = np.asarray(start, np.float64), clip_norm
        self.first, self.second, self.updates, self.reach = 0.0, 0.0, 0, 0.0

    def params(self):
        return self.unravel(jnp.asarray(self.vector, jnp.float32))

    def update(self, gradient, rate: float) -> float:
        """Moves `vector` along its gradient; returns the gradient's norm."""
        gradient = np.array(gradient, np.float64)
        norm = np.linalg.norm(gradient)
        gradient *= min(1.0, self.clip_norm / norm)
        self.updates += 1
        self.first, self.second = 0.9 * self.first + 0.1 * gradient, 0.999 * self.second + 0.001 * gradient**2
        root = np.sqrt(self.second / (1 - 0.999**self.updates)) + 1e-8
        scaled = self.first / (1 - 0.9**self.updates) / root
        self.reach += rate * np.abs(gradient).max() / root
        self.vector = self.vector * (1 - rate * 0.01) - rate * scaled
        return norm


def learner(arm: str, micro_rows: int = 2, **choices):
    """(LearnerConfig, Hyper) of an arm; `choices` are fields of Hyper and ObjectiveConfig on top."""
    objective, hyper = registry.override(*registry.method(arm, OBJECTIVE), RATES | choices)
    optim = OptimConfig(1e-2, 8, clip_norm=1e9)
    critic = optim if objective.estimator == "gae" else None
    config = LearnerConfig(MODEL, objective, optim, critic, objective.kl != "none", 1, micro_rows, 4, TEMPERATURE)
    return config, jax.tree.map(np.float32, hyper)


def start(config, **fields):
    return init_state(config, as_params())._replace(**fields)


@functools.cache
def program(config, mini_batches: int = 1):
    """The train step, compiled once. It refuses arguments of any other shape or type."""
    hyper = jax.tree.map(np.float32, Hyper())
    example = start(config), batched(episodes(0), mini_batches), hyper
    return make_train_step(config).lower(*example).compile()


def first_update(config, hyper, batch, **fields):
    """(gradient, metrics) of the first update of a batch with one mini-batch; `fields` replace those of the state."""
    state, metrics = program(config)(start(config, **fields), batch, hyper)
    moment = optax.tree_utils.tree_get(state.opt_state, "mu")
    return jax.tree.map(lambda m: m / (1.0 - config.optim.b1), moment), metrics
