"""Policies from folders: a run's checkpoint, or published weights."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from epo_jax import checkpoint, mesh, prompting
from epo_jax.command import read_config
from epo_jax.errors import UserError
from epo_jax.models import hf_config, hub, lora, weights
from epo_jax.models.decoder import DecoderConfig, Params, decoder_config, init_params, with_adapters
from epo_jax.models.tokenizer import ChatTokenizer, load_tokenizer
from epo_jax.vocabulary import unused_ids


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


def load(path: str, step: int | None, config: ConfigDict, devices: Mesh | None = None) -> Policy:
    """The policy of a run folder, or of a model folder or hub name, over a mesh's devices.

    Args:
        step: RL steps of the run's checkpoint; the newest when None.
        config: says how a model is read: `model.dtype`, and the longest context that it must take. A run has its own.

    Raises:
        UserError: it is neither, or what it holds cannot be read.
    """
    if not is_run(path):
        if step is not None:
            raise UserError(f"--step={step}: {path} is no run folder, so it has no checkpoints; leave --step out.")
        config = ConfigDict(config.to_dict())
        config.model.path = path
        return Policy(*load_pretrained(config, devices), None, None)
    return load_run(Path(path), read_config(path), step, devices)


def load_run(folder: Path, config: ConfigDict, step: int | None, devices: Mesh | None = None) -> Policy:
    """The policy of the run folder with this config, over a mesh's devices or on the first one.

    Raises:
        UserError: there is no checkpoint of `step` (the newest when None), or it cannot be read.
    """
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = decoder_of_run(config, tokenizer)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    if devices is not None:
        params = mesh.abstract(params, mesh.shardings(devices, params))
    base, params = lora.split(params) if model.lora else ({}, params)
    with checkpoint.open_reader(checkpoint.place(folder, config.checkpoint.folder)) as manager:
        step = manager.latest_step() if step is None else step
        fields = checkpoint.restore_fields(manager, {"base": base, "params": params}, step)
    return Policy(tokenizer, model, lora.join(fields["base"], fields["params"]), config, step)


def load_pretrained(config, devices: Mesh | None = None) -> tuple[ChatTokenizer, DecoderConfig, Params]:
    """The tokenizer, the decoder and the weights of the model folder that `config.model.path` names, over a mesh's devices."""
    folder = hub.resolve(config.model.path)
    tokenizer = load_tokenizer(folder)
    prompting.refuse_rewriting(tokenizer, config, folder)
    model = fit_vocabulary(hf_config.read_config(folder, config.model.dtype, config.model.remat), tokenizer, folder)
    if config.agent.max_tokens > model.max_positions:
        raise UserError(
            f"config.agent.max_tokens={config.agent.max_tokens} exceeds the {model.max_positions} positions that {folder} was "
            f"trained for; set --config.agent.max_tokens={model.max_positions} or less, or choose a model with a longer context."
        )
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return tokenizer, model, weights.load_params(folder, model, mesh.shardings(devices, shapes) if devices else None)


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


def decoder_of_run(config, tokenizer: ChatTokenizer) -> DecoderConfig:
    """The decoder that a run with this config and tokenizer trains, adapters included, without loading its weights."""
    if config.model.path:
        model = hf_config.read_config(hub.resolve(config.model.path), config.model.dtype, config.model.remat)
    else:
        model = decoder_config(config.model)
    model = fit_vocabulary(model, tokenizer, config.model.path)
    return with_adapters(model, config.model) if config.model.lora_rank else model
