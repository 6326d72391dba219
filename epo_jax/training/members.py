"""Where the members of a run are computed.

    InTurns   one member after another, each with the programs of a single run, on every device of a mesh
    Mapped    members mapped over an axis of one program, in equal shares on several devices

Both have the same methods, so that the training loop does not depend on the choice. A single run is one member in turn. The bits
of a member that is computed in turn are those of a run of its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from epo_jax.models import lora
from epo_jax.models.decoder import Params
from epo_jax.models.members import Members
from epo_jax.objectives.batch import TokenBatch
from epo_jax.objectives.spec import Hyper
from epo_jax.parallel import mesh
from epo_jax.training.state import LearnerConfig, TrainState, state_shardings
from epo_jax.training.step import batch_shardings, step_function
from epo_jax.training.step_metrics import Metrics


class States(NamedTuple):
    """The train states of M members.

    Attributes:
        base: the frozen base of adapters, which all members share; empty without adapters.
        own: each member's state without the base: a list (`InTurns`), or one state of arrays [M, ...] (`Mapped`).
    """

    base: Params
    own: Any


@dataclasses.dataclass(frozen=True)
class InTurns:
    """Computes one member after another, on every device of `mesh`.

    Attributes:
        at_once: members that one call of a program computes.
        home: the mesh on which the state of a member is made or restored.
        train_step: (base, state, batch, hyper) -> (state, metrics), jitted; the state is donated.
    """

    mesh: Mesh
    home: Mesh
    train_step: Callable[[Params, TrainState, TokenBatch, Hyper], tuple[TrainState, Metrics]]
    at_once: int = 1

    def place(self, base: Params, own: list[TrainState]) -> States:
        """The states of all members, from each member's."""
        return States(base, own)

    def member(self, states: States, i: int) -> TrainState:
        """The state of member `i`, without the base."""
        return states.own[i]

    def policies(self, states: States) -> Params | Members:
        """What `collect` samples from: the only member's parameters, or those of all members."""
        own = [state.params for state in states.own]
        return lora.join(states.base, own[0]) if len(own) == 1 else Members(states.base, stack(own))

    def update(
        self, states: States, batches: list[TokenBatch | None], hypers: Sequence[Hyper]
    ) -> tuple[States, list[dict[str, float]]]:
        """One RL step of every member that has a batch.

        `states` are donated. A member without a batch has no metrics.
        """
        own, metrics = list(states.own), [{}] * len(batches)
        for i, batch in enumerate(batches):
            if batch is not None:
                batch = mesh.place(batch, batch_shardings(self.mesh))
                own[i], metrics[i] = self.train_step(states.base, own[i], batch, hypers[i])
        return States(states.base, own), [_floats(values) for values in metrics]


@dataclasses.dataclass(frozen=True)
class Mapped:
    """Computes the members of each device of `mesh` by one mapped program.

    Attributes:
        mesh: has the axis "member" alone; its devices have equal shares of the members.
        at_once: members of a device that are computed at a time.
        home: as in `InTurns`.
        train_step: `InTurns.train_step` with an axis M in front of everything but the base.
    """

    mesh: Mesh
    home: Mesh
    train_step: Callable[[Params, TrainState, TokenBatch, Hyper], tuple[TrainState, Metrics]]
    at_once: int

    def place(self, base: Params, own: list[TrainState]) -> States:
        """As `InTurns.place`."""
        each, everywhere = (NamedSharding(self.mesh, spec) for spec in (PartitionSpec("member"), PartitionSpec()))
        return States(jax.device_put(base, everywhere), jax.device_put(stack(own), each))

    def member(self, states: States, i: int) -> TrainState:
        """As `InTurns.member`."""
        return jax.tree.map(lambda x: x[i], states.own)

    def policies(self, states: States) -> Members:
        """As `InTurns.policies`."""
        return Members(states.base, states.own.params)

    def update(
        self, states: States, batches: list[TokenBatch | None], hypers: Sequence[Hyper]
    ) -> tuple[States, list[dict[str, float]]]:
        """As `InTurns.update`.

        A member without a batch gets one without rows, which changes no weight.
        """
        some = next(batch for batch in batches if batch is not None)
        empty = jax.tree.map(np.zeros_like, some)
        batch = stack([empty if batch is None else batch for batch in batches])
        own, metrics = self.train_step(states.base, states.own, batch, stack(list(hypers)))
        metrics = jax.device_get(metrics)
        of_each = [{name: values[i] for name, values in metrics.items()} for i in range(len(batches))]
        return States(states.base, own), [{} if b is None else _floats(m) for b, m in zip(batches, of_each, strict=True)]


Placement = InTurns | Mapped


def in_turns(learner: LearnerConfig, on: Mesh) -> InTurns:
    """Members one after another on the mesh `on`."""
    step, shardings = _without_base(learner), state_shardings(learner, on)
    own, everywhere = shardings._replace(base={}), mesh.replicated(on)

    @functools.wraps(step)
    def train_step(base: Params, state: TrainState, batch: TokenBatch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        with mesh.inside(on):
            return step(base, state, batch, hyper)

    program = jax.jit(
        train_step,
        in_shardings=(shardings.base, own, batch_shardings(on), everywhere),
        out_shardings=(own, everywhere),
        donate_argnums=1,
    )
    return InTurns(on, on, program)


def mapped(learner: LearnerConfig, at_once: int, on: Mesh) -> Mapped:
    """Members mapped over an axis on each device of a `member_mesh`."""
    step = _without_base(learner)

    def of_device(base: Params, *members):
        count = len(jax.tree.leaves(members)[0])
        if at_once >= count:
            return jax.vmap(functools.partial(step, base))(*members)
        return jax.lax.map(lambda member: step(base, *member), members, batch_size=at_once if at_once > 1 else None)

    @functools.partial(jax.jit, donate_argnums=1)
    def train_step(base: Params, states: TrainState, batches: TokenBatch, hypers: Hyper) -> tuple[TrainState, Metrics]:
        each = PartitionSpec("member")
        spread = jax.shard_map(of_device, mesh=on, in_specs=(PartitionSpec(), each, each, each), out_specs=each, check_vma=False)
        return spread(base, states, batches, hypers)

    return Mapped(on, first_device(), train_step, at_once)


def _without_base(learner: LearnerConfig) -> Callable:
    """The RL step of one member: (base, state, batch, hyper) -> (state, metrics)."""
    step = step_function(learner)

    def train_step(base: Params, state: TrainState, batch: TokenBatch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        after, metrics = step(state._replace(base=base), batch, hyper)
        return after._replace(base={}), metrics

    return train_step


def place_members(learner: LearnerConfig, count: int, sweep) -> Placement:
    """Where `count` members of a sweep are computed, by config.sweep.at_once and config.sweep.devices."""
    on = member_mesh(count, sweep.devices)
    at_once = sweep.at_once or (1 if jax.default_backend() == "cpu" else count // on.size)
    return in_turns(learner, first_device()) if at_once == on.size == 1 else mapped(learner, at_once, on)


def first_device() -> Mesh:
    """The mesh of one device of this process."""
    return mesh.make_mesh(1, 1, 1, jax.local_devices()[:1])


def member_mesh(members: int, devices: int) -> Mesh:
    """The mesh of local devices with equal shares of the members.

    It has at most `devices` of them; 0: as many as divide the number of members.
    """
    local = jax.local_devices()
    count = max(n for n in range(1, min(devices or len(local), len(local)) + 1) if members % n == 0)
    return Mesh(np.array(local[:count]), ("member",))


def stack(trees: list):
    """One pytree with a leading axis M."""
    return jax.tree.map(lambda *x: (np if isinstance(x[0], np.ndarray | np.generic) else jnp).stack(x), *trees)


def _floats(metrics: Metrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
