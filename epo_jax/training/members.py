"""The train step of a sweep: the learner's for every member, mapped over them or in turns; several devices may share them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from epo_jax.models.decoder import Params
from epo_jax.objectives.batch import TokenBatch
from epo_jax.objectives.spec import Hyper
from epo_jax.training.optim import stuck
from epo_jax.training.state import LearnerConfig, TrainState
from epo_jax.training.step import Metrics, step_function


def make_members_step(
    config: LearnerConfig, at_once: int, mesh: jax.sharding.Mesh
) -> Callable[..., tuple[TrainState, Metrics, Bool[Array, " M"]]]:
    """(states, base, batches, hypers, alive) -> (states, metrics, still alive): the train step for M members.

    All but the base have a leading axis M; states hold no base of their own and are donated. A member that is not alive, whose
    state would no longer be finite, or none of whose gradients is, keeps the state it has.

    Args:
        at_once: members computed by one mapped program; those of a device go through it in turns. With 1, on one device, the
            program is that of a run of its own, and a member's bits are that run's.
        mesh: with an axis "member", whose devices have equal shares of the members.
    """
    step = step_function(config)

    def train_step(base, state: TrainState, batch: TokenBatch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        after, metrics = step(state._replace(base=base), batch, hyper)
        return after._replace(base={}), metrics

    def settled(state: TrainState, after: TrainState, metrics: Metrics, alive: Bool[Array, ""]):
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(after)]).all()
        alive = alive & finite & ~stuck(metrics)
        return jax.tree.map(lambda new, old: jnp.where(alive, new, old), after, state), alive

    if at_once == 1 and mesh.size == 1:
        return _in_turns(jax.jit(train_step, donate_argnums=1), settled)

    def of_one(base, state: TrainState, batch: TokenBatch, hyper: Hyper, alive: Bool[Array, ""]):
        after, metrics = train_step(base, state, batch, hyper)
        state, alive = settled(state, after, metrics, alive)
        return state, metrics, alive

    def of_device(base, *members):
        count = members[-1].shape[0]
        if at_once >= count:
            return jax.vmap(functools.partial(of_one, base))(*members)
        size = at_once if at_once > 1 else None
        return jax.lax.map(lambda member: of_one(base, *member), members, batch_size=size)

    @functools.partial(jax.jit, donate_argnums=0)
    def members_step(states: TrainState, base: Params, batches: TokenBatch, hypers: Hyper, alive: Bool[Array, " M"]):
        each, all_ = jax.sharding.PartitionSpec("member"), jax.sharding.PartitionSpec()
        spread = jax.shard_map(of_device, mesh=mesh, in_specs=(all_, each, each, each, each), out_specs=each, check_vma=False)
        return spread(base, states, batches, hypers, alive)

    return members_step


def _in_turns(train_step: Callable, settled: Callable) -> Callable:
    """`make_members_step` by a program for one member, called for each of them."""

    @jax.jit
    def take(states: TrainState, i: Int[Array, ""]) -> TrainState:
        return jax.tree.map(lambda x: x[i], states)

    @functools.partial(jax.jit, donate_argnums=0)
    def put(states: TrainState, i: Int[Array, ""], after: TrainState, metrics: Metrics, alive: Bool[Array, ""]):
        state, alive = settled(jax.tree.map(lambda x: x[i], states), after, metrics, alive)
        return jax.tree.map(lambda x, new: x.at[i].set(new), states, state), alive

    def members_step(states: TrainState, base: Params, batches: TokenBatch, hypers: Hyper, alive: Bool[Array, " M"]):
        every, still = [], []
        for i in range(len(alive)):
            batch, hyper = jax.tree.map(lambda x, i=i: x[i], (batches, hypers))
            after, metrics = train_step(base, take(states, i), batch, hyper)
            states, goes_on = put(states, i, after, metrics, alive[i])
            every.append(metrics)
            still.append(goes_on)
        return states, stack(every), jnp.stack(still)

    return members_step


def member_mesh(members: int, devices: int) -> jax.sharding.Mesh:
    """As many local devices as divide the number of members evenly, at most `devices` of them (0: all)."""
    local = jax.local_devices()
    count = max(n for n in range(1, min(devices or len(local), len(local)) + 1) if members % n == 0)
    return jax.sharding.Mesh(np.array(local[:count]), ("member",))


def stack(trees: list):
    """One pytree with a leading axis M."""
    return jax.tree.map(lambda *x: (np if isinstance(x[0], np.ndarray | np.generic) else jnp).stack(x), *trees)
