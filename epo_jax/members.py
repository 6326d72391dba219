"""The train step of a sweep: `learner.make_train_step` mapped over members, which several devices may share."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from epo_jax.learner import Metrics, make_train_step
from epo_jax.models.decoder import Params
from epo_jax.objectives.loss import Hyper
from epo_jax.optim import stuck
from epo_jax.train_state import LearnerConfig, TrainState
from epo_jax.trajectory import TokenBatch


def make_members_step(
    config: LearnerConfig, at_once: int, mesh: jax.sharding.Mesh
) -> Callable[..., tuple[TrainState, Metrics, Bool[Array, " M"]]]:
    """(states, base, batches, hypers, alive) -> (states, metrics, still alive): `make_train_step` for M members.

    All but the base have a leading axis M; states hold no base of their own and are donated. A member that is not alive, whose
    state would no longer be finite, or none of whose gradients is, keeps the state it has.

    Args:
        at_once: members computed by one mapped program; those of a device go through it in turns.
        mesh: with an axis "member", whose devices have equal shares of the members.
    """
    train_step = make_train_step(config)

    def of_one(base, state: TrainState, batch: TokenBatch, hyper: Hyper, alive: Bool[Array, ""]):
        after, metrics = train_step(state._replace(base=base), batch, hyper)
        after = after._replace(base={})
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(after)]).all()
        alive = alive & finite & ~stuck(metrics)
        return jax.tree.map(lambda new, old: jnp.where(alive, new, old), after, state), metrics, alive

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


def member_mesh(members: int, devices: int) -> jax.sharding.Mesh:
    """As many local devices as divide the number of members evenly, at most `devices` of them (0: all)."""
    local = jax.local_devices()
    count = max(n for n in range(1, min(devices or len(local), len(local)) + 1) if members % n == 0)
    return jax.sharding.Mesh(np.array(local[:count]), ("member",))


def stack(trees: list):
    """One pytree with a leading axis M."""
    return jax.tree.map(lambda *x: (np if isinstance(x[0], np.ndarray | np.generic) else jnp).stack(x), *trees)
