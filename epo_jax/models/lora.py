"""Low-rank adapters (arXiv 2106.09685) as a pytree separate from the frozen base.

`join` combines both into the `Params` of an adapted decoder without a copy, so M stacked adapters need the base only once:
`jax.vmap(lambda base, adapters: f(join(base, adapters)), in_axes=(None, 0))`.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from epo_jax.common.files import write_atomically
from epo_jax.models.decoder import DecoderConfig, Params, init_params
from epo_jax.models.weights import projection_module, save_tensors

_MARK = "_lora_"


def init_adapters(config: DecoderConfig, key: Array) -> Params:
    """Initial adapters, without effect: A is random, B is zero."""
    return jax.jit(lambda key: split(init_params(config, key))[1])(key)


def split(params: Params) -> tuple[Params, Params]:
    """Splits the `Params` of an adapted decoder into (base, adapters).

    Any tree with the same keys is split likewise.
    """
    base, adapters = {}, {}
    for key, array in params["layers"].items():
        (adapters if _MARK in key else base)[key] = array
    return params | {"layers": base}, {"layers": adapters}


def join(base: Params, adapters: Params) -> Params:
    """The `Params` of `base` with `adapters`; either may be empty."""
    nested = [key for key in base.keys() & adapters.keys() if isinstance(base[key], dict)]
    return base | adapters | {key: join(base[key], adapters[key]) for key in nested}


def merge(config: DecoderConfig, params: Params) -> Params:
    """Merges the adapters into the base.

    Each W becomes W + alpha / rank * A B.
    """
    base, adapters = split(params)
    layers, lora = dict(base["layers"]), config.lora
    for name in lora.targets if lora else ():
        a, b = (adapters["layers"][f"{name}{_MARK}{which}"] for which in "ab")
        layers[name] = layers[name] + lora.alpha / lora.rank * jnp.matmul(a, b, precision="highest")
    return base | {"layers": layers}


def save_adapters(folder: Path, config: DecoderConfig, adapters: Params, base: str) -> None:
    """Writes a PEFT folder of adapters for the model named `base`.

    Its files are adapter_config.json and adapter_model.safetensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name in config.lora.targets:
        for which in "ab":
            for layer, array in enumerate(np.asarray(adapters["layers"][f"{name}{_MARK}{which}"], np.float32)):
                module = f"base_model.model.model.layers.{layer}.{projection_module(name)}"
                tensors[f"{module}.lora_{which.upper()}.weight"] = array.T
    save_tensors(folder / "adapter_model.safetensors", tensors)
    stated = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "target_modules": list(config.lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    write_atomically(folder / "adapter_config.json", json.dumps(stated, indent=2) + "\n")
