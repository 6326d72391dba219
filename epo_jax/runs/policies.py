"""Policies from folders: a run's checkpoint, or published weights."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from epo_jax.common.errors import UserError
from epo_jax.common.files import expand_user
from epo_jax.common.vocabulary import unused_ids
from epo_jax.models import hf_config, hub, lora, weights
from epo_jax.models.decoder import DecoderConfig, Params, decoder_config, init_params, param_axes, with_adapters
from epo_jax.models.tokenizer import ChatTokenizer, load_tokenizer
from epo_jax.parallel import mesh
from epo_jax.rollout import prompts
from epo_jax.runs import checkpoint, frozen_base
from epo_jax.runs.folder import read_config


class Policy(NamedTuple):
    """A model with its words; `config` and `step` (RL steps taken) are the run's, where it comes from one."""

    tokenizer: ChatTokenizer
    model: DecoderConfig
    params: Params
    config: ConfigDict | None
    step: int | None


def is_run(path: str) -> bool:
    """Whether a path is a run folder; what is not is taken for a model."""
    return (Path(path) / "config.json").is_file() and any((Path(path) / name).is_dir() for name in ("checkpoints", "tokenizer"))


def load(path: str, step: int | None, config: ConfigDict, devices: Mesh | None = None, base: str | None = None) -> Policy:
    """The policy of a run folder, or of a model folder or hub name, over a mesh's devices.

    Args:
        step: RL steps of the run's checkpoint; the newest when None.
        config: for a model, its `model.dtype` and the longest context that it must take; a run has its own config.
        base: the model that a run's adapters were trained on, where it is no longer at the run's config.model.path.

    Raises:
        UserError: it is neither, or what it holds cannot be read.
    """
    path = str(expand_user(path, "--checkpoint"))
    if not is_run(path):
        if step is not None:
            raise UserError(f"--step={step}: {path} is no run folder, so it has no checkpoints; leave --step out.")
        config = ConfigDict(config.to_dict())
        config.model.path = path
        return Policy(*load_pretrained(config, devices), None, None)
    return load_run(Path(path), read_config(Path(path)), step, devices, base)


def load_run(
    folder: Path, config: ConfigDict, step: int | None, devices: Mesh | None = None, base_path: str | None = None
) -> Policy:
    """The policy of the run folder with this config, over a mesh's devices or on the first one; `base_path` as in `load`.

    Raises:
        UserError: there is no checkpoint of `step` (the newest when None), or it cannot be read.
    """
    if base_path is not None:
        config.model.path = base_path
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = decoder_of_run(folder, config, tokenizer)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    if devices is not None:
        params = mesh.abstract(params, mesh.shardings(devices, params, param_axes(model)))
    base, params = lora.split(params) if model.lora else ({}, params)
    with checkpoint.open_reader(checkpoint.place(folder, config.checkpoint.folder)) as manager:
        step = manager.latest_step() if step is None else step
        params = checkpoint.restore_fields(manager, {"params": params}, step)["params"]
    if model.lora:
        params = lora.join(frozen_base.load(folder, config, model, base, step), params)
    return Policy(tokenizer, model, params, config, step)


def load_pretrained(config, devices: Mesh | None = None) -> tuple[ChatTokenizer, DecoderConfig, Params]:
    """The tokenizer, the decoder and the weights of the model folder that `config.model.path` names, over a mesh's devices."""
    folder = hub.resolve(config.model.path)
    tokenizer = load_tokenizer(folder)
    model = fit_vocabulary(hf_config.read_config(folder, config.model.dtype, config.model.remat), tokenizer, folder)
    _check_context(config, tokenizer, model, folder)
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    shardings = mesh.shardings(devices, shapes, param_axes(model)) if devices else None
    return tokenizer, model, weights.load_params(folder, model, shardings)


def _check_context(config, tokenizer: ChatTokenizer, model: DecoderConfig, folder: Path) -> None:
    """Raises UserError if the contexts of the config are too long for the model in `folder`."""
    prompts.refuse_rewriting(tokenizer, config, folder)
    if config.agent.max_tokens > model.max_positions:
        raise UserError(
            f"config.agent.max_tokens={config.agent.max_tokens} exceeds the {model.max_positions} positions that {folder} was "
            f"trained for; set --config.agent.max_tokens={model.max_positions} or less, or choose a model with a longer context."
        )


def fit_vocabulary(model: DecoderConfig, tokenizer: ChatTokenizer, folder: Path | str) -> DecoderConfig:
    """`model` with the ids that the tokenizer does not define as `unused_ids`.

    Raises:
        UserError: the tokenizer has ids past the model's embedding; `folder` is where both come from.
    """
    ids = tokenizer.backend.get_vocab(with_added_tokens=True).values()
    if max(ids) >= model.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {max(ids)} but config.json a vocab_size of {model.vocab_size}; take both "
            "from the same model."
        )
    return dataclasses.replace(model, unused_ids=unused_ids(ids, model.vocab_size))


def decoder_of_run(folder: Path, config, tokenizer: ChatTokenizer) -> DecoderConfig:
    """The decoder that the run in `folder` trains, adapters included, without loading its weights."""
    if (folder / "model" / "config.json").exists():
        model = hf_config.read_config(folder / "model", config.model.dtype, config.model.remat)
    elif config.model.path:  # a run of version 1
        model = hf_config.read_config(hub.resolve(config.model.path), config.model.dtype, config.model.remat)
    else:
        model = decoder_config(config.model)
    model = fit_vocabulary(model, tokenizer, folder)
    return with_adapters(model, config.model) if config.model.lora_rank else model


def keep_decoder(run: Path, config, model: DecoderConfig) -> None:
    """Writes the decoder's shape into the run folder, which is then read without the published model that it began with."""
    if config.model.path:
        (run / "model").mkdir(exist_ok=True)
        hf_config.write_config(run / "model", dataclasses.replace(model, lora=None))


def source_run(config) -> Path:
    """The run folder that `config.init_from` names for the config's seed."""
    return Path(config.init_from.run.replace("{seed}", str(config.seed)))


def source_step(config) -> int | None:
    """RL steps of the checkpoint that `config.init_from` names; None for the newest."""
    return None if config.init_from.step < 0 else config.init_from.step


def load_source(config, devices: Mesh | None = None) -> Policy:
    """The policy of the run that `config.init_from` names, as the run with `config` begins with it.

    Its adapters stay adapters if the new run has the same; otherwise they are merged into the weights.

    Raises:
        UserError: there is no such run or checkpoint, its model is another one than config.model's, or it is over already.
    """
    folder = source_run(config)
    read = read_config(folder)
    for key, value in config.model.items():
        if not key.startswith("lora_") and key not in ("dtype", "remat") and value != read.model[key]:
            raise UserError(
                f"config.model.{key}={value!r} differs from {read.model[key]!r}, that of the run in config.init_from.run="
                f"{str(folder)!r}, whose model this run would train; take the model's keys from there."
            )
    with read.unlocked():
        read.model.update(dtype=config.model.dtype, remat=config.model.remat)
    policy = load_run(folder, read, source_step(config), devices)
    if config.init_from.state == "everything" and policy.step >= config.train.steps:
        raise UserError(
            f"config.train.steps={config.train.steps}: the checkpoint that config.init_from names has {policy.step} RL steps "
            "behind it; raise config.train.steps, or choose an earlier config.init_from.step."
        )
    _check_context(config, policy.tokenizer, policy.model, folder)
    wanted = with_adapters(policy.model, config.model).lora if config.model.lora_rank else None
    if policy.model.lora and policy.model.lora != wanted:
        merged = jax.jit(lora.merge, static_argnums=0)(policy.model, policy.params)
        policy = policy._replace(model=dataclasses.replace(policy.model, lora=None), params=merged)
    return policy
