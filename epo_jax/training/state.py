"""What the train step takes: `LearnerConfig` is static, `TrainState` is on the devices.

A state is made from the policy's weights, or described without them, on one device or sharded over a mesh (parallel/mesh.py).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from epo_jax.models import lora
from epo_jax.models.decoder import DecoderConfig, Params, init_params, param_axes
from epo_jax.models.value import critic_axes, init_critic
from epo_jax.objectives import entropy
from epo_jax.objectives.spec import EntropyHistory, ObjectiveConfig
from epo_jax.parallel import mesh
from epo_jax.settings.table import CriticKind
from epo_jax.training.optim import OptimConfig, like_parameters, make_optimizer


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """Everything static about a train step.

    Attributes:
        model: the policy's shape; with `model.lora`, only its adapters are trained.
        objective: the loss's variants.
        optim, critic_optim: optimizers; a critic exists if `critic_optim` is given.
        reference: keep the initial policy for a KL term; with adapters it is the base, which is there anyway.
        epochs: passes over a batch.
        micro_rows: rows per forward and backward pass, those of all devices together.
        total_steps: RL steps of the run (K of the phase schedule).
        temperature: of the sampling distribution.
        critic: which decoder the critic looks at.
        episode_policy_tokens: the most policy tokens in an episode whose turns are contexts of their own, in any row;
            None where every episode lies in one row.
        gradient_norms: measure the gradients of the policy term and of the entropy term apart.
    """

    model: DecoderConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    critic_optim: OptimConfig | None
    reference: bool
    epochs: int
    micro_rows: int
    total_steps: int
    temperature: float
    critic: CriticKind = "own"
    episode_policy_tokens: int | None = None
    gradient_norms: bool = False


class TrainState(NamedTuple):
    """Everything a resumed run needs on the device. `critic` and `reference` are empty dicts where they are not used.

    `params` are what is trained. With adapters, `base` is the frozen rest of the policy; without, it is empty.
    `kl_scale` times `Hyper.kl_coef` is the coefficient of the KL term: 1 unless the controller is adaptive.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    critic: Params
    critic_opt_state: optax.OptState
    reference: Params
    history: EntropyHistory
    kl_scale: Float[Array, ""]
    base: Params

    def policy(self) -> Params:
        """The whole policy, as the sampler takes it."""
        return lora.join(self.base, self.params)


def init_state(config: LearnerConfig, params: Params) -> TrainState:
    """The state before the first RL step, of a policy with `params`, its adapters among them."""
    objective = config.objective
    base, trained = lora.split(params) if config.model.lora else ({}, params)
    per_turn = objective.max_turns if objective.history_index == "turn" else None
    critic = init_critic(config.critic, params) if config.critic_optim else {}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trained,
        opt_state=make_optimizer(config.optim).init(trained),
        critic=critic,
        critic_opt_state=make_optimizer(config.critic_optim).init(critic) if config.critic_optim else (),
        # The arithmetic would round the weights to its type anyway.
        reference=(
            jax.tree.map(lambda x: jnp.array(x, config.model.dtype), params) if config.reference and not config.model.lora else {}
        ),
        history=entropy.init_history(config.total_steps, per_turn),
        kl_scale=jnp.ones((), jnp.float32),
        base=base,
    )


def init_state_on(config: LearnerConfig, params: Params, on: Mesh) -> TrainState:
    """`init_state`, sharded over a mesh. `params`, which are sharded already, are donated."""
    make = jax.jit(init_state, static_argnums=0, donate_argnums=1, out_shardings=state_shardings(config, on))
    return make(config, params)


def state_axes(config: LearnerConfig) -> TrainState:
    """The logical axes of each array of the state. An optimizer's moments have those of their parameters."""

    def whole(x) -> mesh.Axes:
        return (None,) * x.ndim

    state, policy = abstract_state(config), param_axes(config.model)
    base, params = lora.split(policy) if config.model.lora else ({}, policy)
    critic, critic_opt_state = {}, ()
    if config.critic_optim:
        critic = critic_axes(config.critic, policy)
        critic_opt_state = like_parameters(config.critic_optim, state.critic_opt_state, critic, whole)
    return TrainState(
        step=(),
        params=params,
        opt_state=like_parameters(config.optim, state.opt_state, params, whole),
        critic=critic,
        critic_opt_state=critic_opt_state,
        reference=policy if config.reference and not config.model.lora else {},
        history=jax.tree.map(whole, state.history),
        kl_scale=(),
        base=base,
    )


def state_shardings(config: LearnerConfig, on: Mesh) -> TrainState:
    """The sharding of each array of the state."""
    return mesh.shardings(on, abstract_state(config), state_axes(config))


def abstract_state_on(config: LearnerConfig, on: Mesh) -> TrainState:
    """Shapes, types and places of the state, nothing computed."""
    return mesh.abstract(abstract_state(config), state_shardings(config, on))


def abstract_state(config: LearnerConfig) -> TrainState:
    """Shapes and types of the state, nothing computed."""
    params = jax.eval_shape(functools.partial(init_params, config.model), jax.random.key(0))
    return jax.eval_shape(functools.partial(init_state, config), params)
