"""What a run will need, before anything is loaded or written: `--dry_run`.

Sizes come from the config, memory from the compiler, and the time of an RL step from a product of matrices of the model's own
shapes, which is timed on this device. No weights are made, and a published model is not downloaded: if it is not a folder on this
machine, its sizes are those of config.model.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from epo_jax.common.progress import clock
from epo_jax.models import attention, generate, hf_config
from epo_jax.models.decoder import DecoderConfig, decoder_config, init_params, param_axes, with_adapters
from epo_jax.objectives.batch import TokenBatch
from epo_jax.objectives.spec import Hyper
from epo_jax.parallel import mesh
from epo_jax.rollout.collect import check_devices
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.runs.policies import source_run
from epo_jax.settings.columns import column_line
from epo_jax.training import flops
from epo_jax.training.batch import step_batch
from epo_jax.training.from_config import learner_config, objective_and_hyper
from epo_jax.training.members import in_turns
from epo_jax.training.state import LearnerConfig, abstract_state_on
from epo_jax.training.step import batch_shardings

_ROWS = 512  # of the product that is timed, at most
_ROUNDS = 3


def define_flag(values: flags.FlagValues) -> None:
    flags.DEFINE_bool(
        "dry_run", False, "Print sizes, memory and the time of an RL step; load, write and train nothing.", flag_values=values
    )


def describe(config) -> Iterator[str]:
    """Lines about a run with this config, each as soon as it is known.

    Raises:
        UserError: the config does not fit together or to these devices.
    """
    if line := column_line(config):
        yield line
    devices = mesh.make_mesh(**config.mesh.to_dict())
    check_devices(config.rollout.devices)
    attention.check_rows(config.train.rows_tokens)
    objective, hyper = objective_and_hyper(config)
    plain, source = sizes(config)
    mesh.check(devices, plain, config.train.rows_tokens)
    model = with_adapters(plain, config.model) if config.model.lora_rank else plain
    learner = learner_config(config, model, objective, mesh.row_shards(devices))
    state = abstract_state_on(learner, devices)
    trained, policy = (sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for tree in (state.params, state.policy()))
    yield f"model: {policy:,} parameters, of which {trained:,} are trained ({source})"
    contexts, sampled = longest_episodes(config)
    yield (
        f"RL step: {learner.objective.num_trajectories} episodes of at most {config.env.max_turns} turns; at most "
        f"{sum(contexts):,} tokens, {sampled:,} of them sampled"
    )
    yield f"programs: {', '.join(programs(config, learner))}; each is compiled once and kept on disk"
    yield (
        f"memory of each device: {_bytes(held(state))} for the state; in the rollout, also "
        f"{_bytes(held(sampling_weights(model, devices)))} for the weights to sample from and "
        f"{_bytes(held(caches(config, model, devices)))} for {config.rollout.slots} key-value caches"
    )
    started = time.perf_counter()
    memory = compiled(learner, devices, abstract_batch(config, learner, devices), hyper).memory_analysis()
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    most, here = arguments + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes, device_memory(devices)
    yield (
        f"memory of the train step, from the compiler: {_bytes(most)}, of which {_bytes(arguments)} are state and batch; "
        f"a device here has {_bytes(here)} (compiled in {time.perf_counter() - started:.0f} s)"
    )
    if most > here:
        yield "warning: it does not fit; use more devices (config.mesh), adapters (config.model.lora_rank) or shorter rows"
    rollout, update = flops.sampling_flops(model, contexts, sampled), flops.update_flops(learner, contexts, sampled)
    yield f"operations of an RL step of the longest episodes: {rollout:.1e} in the rollout, {update:.1e} in the update"
    rollout, update = seconds(config, learner, contexts, sampled, devices)
    yield (
        f"time of its matrix products at the speed of {devices.size} x {devices.devices.flat[0].device_kind}: "
        f"{_duration(rollout)} in the rollout, {_duration(update)} in the update; {config.train.steps} such RL steps: "
        f"{_duration(config.train.steps * (rollout + update))}"
    )
    yield "Nothing was loaded or written."


def sizes(config) -> tuple[DecoderConfig, str]:
    """The decoder of the config, without adapters, and where its sizes are from."""
    settings = config.model
    path = source_run(config) / "model" if config.init_from.run else Path(settings.path).expanduser()
    if settings.path and (path / "config.json").is_file():
        return hf_config.read_config(path, settings.dtype, settings.remat), f"sizes of {path}"
    return decoder_config(settings), "sizes of config.model"


def longest_episodes(config) -> tuple[list[int], int]:
    """(tokens of every context, sampled tokens) of an RL step whose episodes are as long as they may be."""
    episodes, window = config.rollout.groups * config.rollout.group_size, config.agent.context == "window"
    sampled = config.env.max_turns * config.agent.response_tokens
    if not window:
        sampled = min(sampled, config.train.rows_policy_tokens, config.agent.max_tokens)
    return [config.agent.max_tokens] * (episodes * (config.env.max_turns if window else 1)), episodes * sampled


def programs(config, learner: LearnerConfig) -> list[str]:
    """What will be compiled, in words."""
    cloning = [f"update of the warm start ({config.warm_start.steps} times)"] if config.warm_start.episodes else []
    return [*cloning, "prefill and decode for each size of a lane", f"train step ({learner.objective.estimator})"]


def abstract_batch(config, learner: LearnerConfig, devices: Mesh) -> TokenBatch:
    """The shapes and places of an RL step's batch."""
    episodes = [Trajectory({"id": "", "type": ""}) for _ in range(learner.objective.num_trajectories)]
    return mesh.abstract(step_batch(config, learner.objective, 0, episodes, learner.micro_rows), batch_shardings(devices))


def compiled(learner: LearnerConfig, devices: Mesh, batch: TokenBatch, hyper: Hyper):
    """The train step of a run, compiled for shapes alone."""
    state = abstract_state_on(learner, devices)
    program: Any = in_turns(learner, devices).train_step
    return program.lower(state.base, state._replace(base={}), batch, hyper).compile()


def sampling_weights(model: DecoderConfig, devices: Mesh):
    """The abstract weights that the rollout samples from, in the type of the arithmetic."""
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), params)
    return mesh.abstract(params, mesh.shardings(devices, params, param_axes(model), without="fsdp"))


def caches(config, model: DecoderConfig, devices: Mesh):
    """The abstract key-value caches of all slots."""
    dtype = config.rollout.cache_dtype
    slots = -(-config.rollout.slots // mesh.row_shards(devices)) * mesh.row_shards(devices)
    cache = jax.eval_shape(lambda: generate.init_cache(model, slots, config.agent.max_tokens, *([dtype] if dtype else [])))
    return mesh.abstract(cache, mesh.shardings(devices, cache, generate.cache_axes(cache)))


def held(tree) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_memory(devices: Mesh) -> int:
    """Bytes of memory of one device; for a CPU, those of the machine."""
    stats = devices.devices.flat[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def seconds(config, learner: LearnerConfig, contexts: list[int], sampled: int, devices: Mesh) -> tuple[float, float]:
    """(rollout, update): seconds of the matrix products of an RL step, at the speed of this device.

    Prefill and update run at the speed of a wide product. A pass of decode reads every weight once for the rows of a lane, so it
    takes as many narrow products as the model has weights.
    """
    model, settings = learner.model, config.rollout
    tokens = min(_ROWS, config.train.rows_tokens * learner.micro_rows // mesh.row_shards(devices))
    rate = product_flops(model, tokens) / product_seconds(model, tokens) * devices.size
    lane = -(-settings.slots // (settings.lanes * mesh.row_shards(devices)))
    weights = sum(rows * columns for rows, columns in model.projection_sizes().values()) * model.num_layers
    weights += model.d_model * model.vocab_size
    a_pass = product_seconds(model, lane) * weights / (model.d_model * model.d_ff)
    passes = sampled / (lane * mesh.row_shards(devices))
    prefill = flops.sampling_flops(dataclasses.replace(model, lora=None), contexts, 0)
    return prefill / rate + passes * a_pass, flops.update_flops(learner, contexts, sampled) / rate


def product_flops(model: DecoderConfig, rows: int) -> float:
    """Operations of the product that `product_seconds` times."""
    return 2.0 * rows * model.d_model * model.d_ff


def product_seconds(model: DecoderConfig, rows: int) -> float:
    """Seconds of one product [rows, D] x [D, d_ff] on the first device, in the type of the arithmetic; the best of a few."""
    x, w = jnp.ones((rows, model.d_model), model.dtype), jnp.ones((model.d_model, model.d_ff), model.dtype)
    product, best = jax.jit(jnp.matmul), math.inf
    product(x, w).block_until_ready()
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        product(x, w).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return best


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds) if seconds < 86400 else f"{seconds / 86400:.1f} days"
