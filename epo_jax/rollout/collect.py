"""Episodes in, trajectories out: `collect` plays a rollout on all devices of all hosts."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from epo_jax.common import progress
from epo_jax.common.errors import UserError
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models import lora
from epo_jax.models.decoder import DecoderConfig, Params, unstack
from epo_jax.models.members import Members
from epo_jax.models.tokenizer import ChatTokenizer
from epo_jax.parallel import hosts, mesh
from epo_jax.rollout.episode import Episode, LiveEpisode
from epo_jax.rollout.exchange import of_all_processes
from epo_jax.rollout.lane import Sampler
from epo_jax.rollout.prompts import RolloutConfig, SamplingConfig
from epo_jax.rollout.scheduler import RolloutStats, Scheduler
from epo_jax.rollout.trajectory import Trajectory


class Player(NamedTuple):
    """A policy's part of a rollout: a run has one player, a sweep has one for each member.

    Attributes:
        episodes: what it plays, perhaps nothing.
        key: seeds its sampling, together with an episode's id.
    """

    episodes: list[Episode]
    tokenizer: ChatTokenizer
    key: jax.Array


def collect(
    players: Sequence[Player],
    params: Params | Members,
    pool: EnvPool,
    model: DecoderConfig,
    config: RolloutConfig,
    sampling: SamplingConfig,
    purpose: str = "rollout",
) -> tuple[list[list[Trajectory]], RolloutStats]:
    """Plays every episode once; returns each player's trajectories, in the order of its episodes.

    A trajectory depends on its player's key and parameters, its episode's id and task, and the sampling settings. With the
    same episodes and slots it is the same bit for bit, whatever the timing and the number of workers. Other episodes around
    it, or another number of slots, change the shapes of the batches, which reassociates float sums.

    If a run has several processes, each plays its share of the episodes in its share of the slots, and all processes get all
    trajectories, those of other processes without observations.

    Args:
        params: the only player's, on one device or on a mesh; or `Members`, one for each player, whose members may be sharded
            over a mesh with the axis "member": each device then plays its own members.
        config: with `Members`, its `at_once` applies and its `devices` does not.
        purpose: what the progress line calls it.
    """
    model = model if config.dtype is None else dataclasses.replace(model, dtype=config.dtype)
    slots = -(-config.slots // jax.process_count())
    live = [[LiveEpisode(e, player.tokenizer, config) for e in hosts.share(player.episodes)] for player in players]
    stop_ids, block = players[0].tokenizer.stop_ids, min(config.block, config.response_tokens)
    with progress.shown(purpose, sum(map(len, live)), "episodes") as reach:
        scheduler = Scheduler(pool, model, dataclasses.replace(config, slots=slots), reach)
        for some, policy, key in _policies(players, params, model, config):
            if any(live[some]):
                scheduler.add_lanes(live[some], policy, Sampler(key, stop_ids, sampling, block))
        scheduler.run()
    _check_room([episode for of_player in live for episode in of_player], config)
    together = [
        of_all_processes(player.episodes, [episode.trajectory for episode in of_player])
        for player, of_player in zip(players, live, strict=True)
    ]
    return together, _stats_of_all(scheduler.stats)


def _check_room(episodes: Sequence[LiveEpisode], config: RolloutConfig) -> None:
    """Raises UserError if no episode's first prompt had room in a context."""
    lacking = [episode.lacking for episode in episodes if episode.lacking]
    if lacking and len(lacking) == len(episodes):
        raise UserError(
            f"config.agent.max_tokens={config.max_tokens} has no room for the first prompt of any episode. With an answer of "
            f"{config.response_tokens} (config.agent.response_tokens), they take {min(lacking)} to {max(lacking)} tokens; set it "
            f"to {max(lacking)}, better to several times as much."
        )


def _policies(
    players: Sequence[Player], params: Params | Members, model: DecoderConfig, config: RolloutConfig
) -> Iterator[tuple[slice, Params | Members, jax.Array]]:
    """Yields (players, their unstacked parameters, their keys) for every set of players that shares lanes."""
    if not isinstance(params, Members):
        yield slice(0, 1), _sampled_from(params, model, config.devices), players[0].key
        return
    keys, unstacked = jnp.stack([player.key for player in players]), functools.partial(unstack, model)
    devices = _member_devices(params)
    shared = [unstacked(jax.device_put(params.shared, device)) for device in devices]
    share = len(players) // len(devices)
    for first in range(0, share, config.at_once):
        # The next members of each device, so that the lanes of all devices begin together.
        for device, base, start in zip(devices, shared, range(0, len(players), share), strict=True):
            some = slice(start + first, start + min(first + config.at_once, share))
            which = some if config.at_once > 1 else some.start
            if any(player.episodes for player in players[some]):
                own, key = jax.device_put(jax.tree.map(lambda x, which=which: x[which], (params.own, keys)), device)
                policy = Members(base, jax.vmap(unstacked)(own)) if config.at_once > 1 else lora.join(base, unstacked(own))
                yield some, policy, key


def _member_devices(params: Members) -> list[jax.Device | None]:
    """The devices that the members are sharded over; [None] if all are in one place."""
    sharding = jax.tree.leaves(params.own)[0].sharding
    return list(sharding.mesh.devices.flat) if len(sharding.device_set) > 1 else [None]


def check_devices(devices: int) -> None:
    """Raises UserError if this process has fewer devices than `config.rollout.devices`."""
    local = jax.local_devices()
    if devices > len(local):
        raise UserError(
            f"config.rollout.devices={devices} is more than this process has: {len(local)} {local[0].platform} device"
            f"{'s' if len(local) > 1 else ''}; choose at most as many."
        )


def _sampled_from(params: Params, model: DecoderConfig, devices: int) -> Params:
    """The parameters of a run, unstacked, on the devices where this process samples."""
    params = jax.tree.map(lambda x: x.astype(model.dtype), params)  # fewer bytes to transfer
    if mesh.mesh_of(params) is not None:
        params = mesh.on_this_host(params)
    elif devices > 1:
        check_devices(devices)
        params = jax.device_put(params, mesh.replicated(mesh.make_mesh(devices, 1, 1, jax.local_devices())))
    return unstack(model, params)


def _stats_of_all(stats: RolloutStats) -> RolloutStats:
    """The sum of all processes' stats; their seconds pass at the same time."""
    of_each = [RolloutStats(**fields) for fields in hosts.gather(vars(stats))]
    return dataclasses.replace(sum(of_each, start=RolloutStats()), seconds=max(s.seconds for s in of_each))


def warn_full(trajectories: Sequence[Trajectory], config: RolloutConfig) -> None:
    """Prints how many episodes ended because a prompt or its answer had no room, if any did."""
    if full := sum(t.full for t in trajectories):
        keys = "config.agent.max_tokens" + ("" if config.window else " or config.train.rows_policy_tokens")
        print(
            f"warning: {full} of {len(trajectories)} episodes ended because the next prompt or its answer had no room; "
            f"raise {keys}, or shorten prompts (config.env.hints, config.agent.history_turns)",
            flush=True,
        )
