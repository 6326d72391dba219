"""The policy that RL begins with.

named_policy     the policy that the config names: of another run, or a published model
plan             what the warm start needs, with every refusal before anything is written
initial_params   the weights, from scratch where no policy is named
clone_experts    the warm start
add_adapters     fresh adapters on top
"""

import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from epo_jax.common import keys, progress
from epo_jax.common.errors import Stopped, UserError
from epo_jax.common.stopping import StopRequest
from epo_jax.envs.base import Demonstration, Task, environment
from epo_jax.models import lora
from epo_jax.models.decoder import DecoderConfig, Params, decoder_config, init_params, param_axes, with_adapters
from epo_jax.models.tokenizer import ChatTokenizer, compose_embedding, train_tokenizer
from epo_jax.parallel import mesh
from epo_jax.rollout import prompts
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.runs import frozen_base
from epo_jax.runs.policies import fit_vocabulary, load_pretrained, load_source, source_run
from epo_jax.training import sft, warm_start
from epo_jax.training.optim import OptimConfig


class InitialPolicy(NamedTuple):
    """A policy before its warm start.

    Attributes:
        params: None for weights from scratch.
        experts: the episodes that the warm start clones; none without one.
    """

    tokenizer: ChatTokenizer
    model: DecoderConfig
    params: Params | None
    experts: list[Trajectory]


def named_policy(config, devices: Mesh | None = None) -> InitialPolicy | None:
    """The policy of another run or a published model; None without one.

    config.init_from or config.model.path names it; it is placed on the devices of a mesh.
    """
    if config.init_from.run:
        return InitialPolicy(*load_source(config, devices)[:3], [])
    return InitialPolicy(*load_pretrained(config, devices), []) if config.model.path else None


def plan(config, tasks: list[Task], named: InitialPolicy | None, folder: Path) -> InitialPolicy:
    """The policy before its warm start, with every refusal. Nothing is written.

    Args:
        named: that of `named_policy`.
        tasks: the training tasks, whose expert episodes the warm start clones. The policy of another run has none.
        folder: where the policy will be kept, for messages.

    Raises:
        UserError: there is nothing to clone, or none of it fits.
    """
    demonstrations = [] if config.init_from.run else expert_demonstrations(config, tasks)
    if named is None:
        tokenizer = own_tokenizer(config, demonstrations)
        named = InitialPolicy(tokenizer, fit_vocabulary(decoder_config(config.model), tokenizer, folder), None, [])
    return named._replace(experts=expert_trajectories(config, named.tokenizer, demonstrations))


def initial_params(config, policy: InitialPolicy, devices: Mesh | None = None) -> Params:
    """The weights before the warm start, on the devices of a mesh."""
    if policy.params is not None:
        return policy.params
    params = blank_params(config, policy.model, policy.tokenizer)
    return _placed(params, param_axes(policy.model), devices)


def add_adapters(config, model: DecoderConfig, params: Params, devices: Mesh | None = None) -> tuple[DecoderConfig, Params]:
    """The model and its weights with the adapters of the config.

    The adapters are fresh unless the model has some already.
    """
    if not config.model.lora_rank or model.lora:
        return model, params
    model = with_adapters(model, config.model)
    adapters = lora.init_adapters(model, keys.key(config.seed, "adapters"))
    _, axes = lora.split(param_axes(model))
    return model, lora.join(params, _placed(adapters, axes, devices))


def _placed(params: Params, axes, devices: Mesh | None) -> Params:
    return params if devices is None else mesh.place(params, mesh.shardings(devices, params, axes))


def keep_base(config, workdir: Path, model: DecoderConfig, params: Params, published: bool) -> None:
    """Stores the frozen base of a run's adapters.

    A `published` model that no warm start has changed is stored by reference.
    """
    base = lora.split(params)[0]
    if config.init_from.run and model.lora:
        frozen_base.copy(source_run(config), workdir, model, base)
    elif published and not config.init_from.run:
        frozen_base.refer(workdir, frozen_base.digest(base), None)
    else:
        frozen_base.store(workdir, model, base)


def expert_demonstrations(config, tasks: list[Task]) -> list[Demonstration]:
    """The expert episodes that the warm start clones.

    Their tasks are drawn by the seed; each episode is followed by its renamed copies (`warm_start.copies`).

    Lost episodes are among them only with `warm_start.lost`.

    Raises:
        UserError: the config has a warm start, and there is nothing to clone.
    """
    settings, env = config.warm_start, environment(config.env.name)
    if not settings.episodes:
        return []
    drawn = keys.generator(config.seed, "demonstrations").permutation(len(tasks))[: settings.episodes]
    chosen = [tasks[i] for i in drawn]
    times = 1 + settings.copies
    demonstrations = env.demonstrations([task for task in chosen for _ in range(times)], config.env.to_dict())
    if times > 1:
        copies = [d for i, d in enumerate(demonstrations) if i % times]
        demonstrations = demonstrations[::times] + env.rename(copies, config.seed)
    asked = len(chosen) * times
    missing = asked - len(demonstrations)
    lost = sum(not d.won for d in demonstrations)
    kept = demonstrations if settings.lost else [d for d in demonstrations if d.won]
    line = (
        f"of {asked} expert episodes, {missing} do not exist within config.env.max_turns={config.env.max_turns} turns and {lost} "
        "are lost"
    )
    if not kept:
        clone_lost = ", set config.warm_start.lost=True to clone lost ones," if lost else ""
        raise UserError(
            f"config.warm_start.episodes={settings.episodes}: there is nothing to clone: {line}; raise "
            f"config.env.max_turns{clone_lost} or set config.warm_start.episodes=0 to train without a warm start."
        )
    if missing or lost:
        print(f"warm start: {line}" + ", which are cloned as well (config.warm_start.lost)" * (settings.lost and lost > 0))
    return kept


def expert_trajectories(config, tokenizer: ChatTokenizer, demonstrations: list[Demonstration]) -> list[Trajectory]:
    """The expert episodes in tokens, if each of their contexts fits in `agent.max_tokens`.

    Raises:
        UserError: no episode fits.
    """
    play = prompts.rollout_config(config)
    trajectories = [sft.to_trajectory(d, tokenizer, play) for d in demonstrations]
    fitting = [t for t in trajectories if t.longest_context <= config.agent.max_tokens]
    if not demonstrations:
        return []
    if not fitting:
        raise UserError(
            f"config.agent.max_tokens={config.agent.max_tokens}: none of the {len(trajectories)} expert episodes of the warm "
            f"start fits, the shortest needs {min(t.longest_context for t in trajectories)} tokens; raise it and "
            "config.train.rows_tokens, or set config.warm_start.episodes=0."
        )
    mean = np.mean([len(t.tokens) for t in fitting])
    print(
        f"warm start on {len(fitting)} expert episodes, {mean:.0f} tokens each"
        + f"; {len(trajectories) - len(fitting)} do not fit in config.agent.max_tokens={config.agent.max_tokens}"
        * (len(fitting) < len(trajectories)),
        flush=True,
    )
    return fitting


def own_tokenizer(config, demonstrations: list[Demonstration]) -> ChatTokenizer:
    """A tokenizer of config.model.vocab_size tokens, trained on the experts' observations and actions.

    If the texts yield fewer, the size is rounded down to a multiple of 32, which loses some rare merges: tokenizers of different
    seeds then define the same ids, so that a sweep trains these seeds in one program.
    """
    window = prompts.window_of(config)
    texts = [text for d in demonstrations for pair in sft.transcript(d, config.agent.style, window) for text in pair]
    phrases, size = environment(config.env.name).phrases, config.model.vocab_size
    tokenizer = train_tokenizer(texts, size, phrases)
    rounded = tokenizer.vocab_size // 32 * 32
    if rounded < tokenizer.vocab_size < size:
        tokenizer = train_tokenizer(texts, rounded, phrases)
    return tokenizer


def blank_params(config, model: DecoderConfig, tokenizer: ChatTokenizer) -> Params:
    """Weights to train from scratch."""
    params = jax.jit(init_params, static_argnums=0)(model, keys.key(config.seed, "weights"))
    params["embedding"] = compose_embedding(np.asarray(params["embedding"]), tokenizer, config.seed)
    return params


def clone_experts(
    config, model: DecoderConfig, params: Params, trajectories: list[Trajectory], folder: Path, stop: StopRequest
) -> Params:
    """The parameters after the warm start; prints its progress. `params` are donated.

    A warm start that was stopped continues from `folder`.

    Raises:
        Stopped: the process was asked to stop, and the state is in `folder`.
    """
    settings, optim = config.warm_start, cloning_optim(config)
    rows = max(1, settings.batch_tokens // config.train.rows_tokens)
    found = warm_start.restore(folder, params, optim)
    if found is not None:
        print(f"the first {found.updates} updates of the warm start are done", flush=True)
    cloning = sft.warm_start(
        params, trajectories, model, optim, config.train.rows_tokens, rows, settings.prompt_weight, config.seed, found
    )
    started = time.perf_counter()
    with progress.shown("warm start", settings.steps, "updates") as reach:
        for cloned in cloning:
            params, updates = cloned.params, cloned.updates
            reach(updates)
            if updates % max(1, settings.steps // 10) == 0:
                seconds = time.perf_counter() - started
                line = (
                    f"warm start {updates}/{settings.steps}  cross-entropy {cloned.cross_entropy:.3f} nats/token  {seconds:.0f} s"
                )
                progress.clear()
                print(line, flush=True)
            if stop.asked and updates < settings.steps:
                warm_start.save(folder, cloned)
                raise Stopped(stop.sentence(f"{updates} updates of the warm start done and saved"))
    return params


def cloning_optim(config) -> OptimConfig:
    """The optimizer of the warm start."""
    settings = config.warm_start
    return OptimConfig(
        settings.lr,
        settings.steps,
        weight_decay=config.optim.weight_decay,
        floor_ratio=0.1,
        b2=0.98,
        muon=settings.optimizer == "muon",
    )
