"""Reads and writes the weights of Hugging Face model folders (safetensors).

A checkpoint stores each projection of each layer separately, as [out, in]; `Params` stacks the layers and stores [in, out].
`tensor_names` is the only mapping between the two.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from epo_jax.common.errors import UserError, explain
from epo_jax.common.files import write_atomically
from epo_jax.models.decoder import PROJECTIONS, DecoderConfig, Params, init_params
from epo_jax.models.hf_config import write_config

_TENSORS = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
_LAYER_TENSORS = {
    "input_norm": "input_layernorm.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}

# The largest size of a file of weights, in bytes; more weights are written as several files.
SHARD_BYTES = 4 * 10**9


def projection_module(name: str) -> str:
    """The Hugging Face module of a projection: q_proj -> self_attn.q_proj."""
    return f"{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"


def tensor_names(key: str, layers: int | None = None) -> list[str]:
    """The tensor names in a checkpoint of leaf `key` of `Params`.

    With `layers` the leaf is one of `Params["layers"]`.
    """
    if layers is None:
        return [_TENSORS[key]]
    projection = key.replace("_bias", "_proj")
    if projection in PROJECTIONS:
        suffix = f"{projection_module(projection)}.{'weight' if key == projection else 'bias'}"
    else:
        suffix = _LAYER_TENSORS[key]
    return [f"model.layers.{layer}.{suffix}" for layer in range(layers)]


def load_params(folder: Path, config: DecoderConfig, shardings=None) -> Params:
    """Loads the weights of `folder` as float32 arrays.

    They are in one or several safetensors files. Names, shapes and types are checked before the first weight is read. Tensors
    are read one at a time, and each host reads only its devices' shards, so that host memory holds little more than one
    tensor in addition to the shards.

    The lm_head of a tied checkpoint is ignored. If it differs from the embedding, a line is printed: transformers 4 and vLLM tie
    such a model too, transformers 5 does not.

    Args:
        shardings: pytree like `Params` of shardings that do not shard the axis of layers; None is the default device.

    Raises:
        UserError: a file is missing or truncated, or a tensor is missing, unknown, stored twice with different values, or of
            another shape or type.
    """
    folder = Path(folder)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    if shardings is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    tensors = _checked_tensors(folder, config)

    def leaf(key: str, shape, sharding: Sharding) -> jax.Array:
        (name,) = tensor_names(key)
        return _read(tensors[name], shape.shape, sharding, transposed=False)

    def stack(key: str, shape, sharding: Sharding) -> jax.Array:
        whole = jax.jit(lambda: jnp.zeros(shape.shape, jnp.float32), out_shardings=sharding)()
        one = sharding
        if isinstance(sharding, NamedSharding):
            one = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        for layer, name in enumerate(tensor_names(key, config.num_layers)):
            whole = _put_layer(whole, _read(tensors[name], shape.shape[1:], one, transposed=True), layer)
        return whole

    top = {key: leaf(key, shape, shardings[key]) for key, shape in shapes.items() if key != "layers"}
    layers = {key: stack(key, shape, shardings["layers"][key]) for key, shape in shapes["layers"].items()}
    return top | {"layers": layers}


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(whole, tensor, layer):
    return jax.lax.dynamic_update_index_in_dim(whole, tensor, layer, 0)


def _read(stored, shape: tuple[int, ...], sharding: Sharding, transposed: bool) -> jax.Array:
    """One tensor on its devices; each device's shard is read from the file separately."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if transposed:
            return np.ascontiguousarray(stored[index[::-1]].T, np.float32)
        return stored[index].astype(np.float32, copy=False)

    return jax.make_array_from_callback(shape, sharding, part)


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint of this model."""
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    expected = {tensor_names(key)[0]: shape.shape for key, shape in shapes.items() if key != "layers"}
    for key, shape in shapes["layers"].items():
        expected |= dict.fromkeys(tensor_names(key, config.num_layers), shape.shape[:0:-1])
    return expected


def _checked_tensors(folder: Path, config: DecoderConfig) -> dict:
    """Every tensor of the model as an unread slice of its file, after checking all of them."""
    expected = expected_shapes(config)
    source, file_of = _weight_map(folder)
    opened = {file: _open(file) for file in sorted(set(file_of.values()))}

    def stored(name: str):
        try:
            return opened[file_of[name]].get_slice(name)
        except SafetensorError:
            raise UserError(f"{file_of[name]} lacks tensor {name}; download the model again.") from None

    for file, reader in opened.items():
        for name in file_of.keys() & reader.keys():
            if file_of[name] != file and not _equal(reader.get_slice(name), stored(name)):
                raise UserError(f"{file} and {file_of[name]} differ in tensor {name}; download the model again.")

    # Our name -> stored name. A checkpoint of the bare decoder, without the class of the output head, has no prefix.
    stored_as = {f"model.{name}" if f"model.{name}" in expected else name: name for name in file_of}
    embedding, head = _TENSORS["embedding"], _TENSORS["lm_head"]
    if config.tie_embeddings and head in stored_as:
        tied = stored_as.pop(head)
        if embedding not in stored_as:
            stored_as[embedding] = tied
        elif not _equal(stored(stored_as[embedding]), stored(tied)):
            print(
                f"{file_of[tied]}: {tied} differs from the embedding and is not read, as {folder / 'config.json'} ties the two; "
                "set tie_word_embeddings to false there to read it."
            )
    for name, under in stored_as.items():
        # Old Llama checkpoints include rotary frequencies, which follow from the config.
        if name not in expected and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(
                f"{file_of[under]}: {folder / 'config.json'} has no place for tensor {under}; take both from the same model."
            )
    tensors = {}
    for name, shape in expected.items():
        if name not in stored_as:
            untied = f", or set tie_word_embeddings to true in {folder / 'config.json'}" * (name == head)
            raise UserError(f"{source} lacks tensor {name}; download the model again{untied}.")
        under = stored_as[name]
        file, found = file_of[under], stored(under)
        if tuple(found.get_shape()) != shape:
            raise UserError(
                f"{file}: tensor {name} has shape {found.get_shape()}, but {folder / 'config.json'} requires "
                f"{list(shape)}; take both from the same model."
            )
        if found.get_dtype() not in ("F32", "F16", "BF16"):
            raise UserError(f"{file}: tensor {name} is stored as {found.get_dtype()}; take weights in F32, F16 or BF16.")
        tensors[name] = found
    return tensors


def _equal(left, right) -> bool:
    """Whether two stored tensors have the same values; reads a few thousand rows at a time."""
    if left.get_shape() != right.get_shape():
        return False
    rows = (left.get_shape() or [0])[0]
    starts = range(0, rows, 4096)
    return all(np.array_equal(left[i : min(i + 4096, rows)], right[i : min(i + 4096, rows)]) for i in starts)


def save_params(folder: Path, config: DecoderConfig, params: Params, more: dict | None = None, dtype: str = "float32") -> None:
    """Writes config.json and the weights in `dtype` for `load_params` and transformers.

    `params` must have no adapters (`lora.merge`); `more` are additional keys of config.json.
    """
    sources: dict[str, tuple[Any, int | None]] = {}
    sources |= {tensor_names(key)[0]: (array, None) for key, array in params.items() if key != "layers"}
    for key, array in params["layers"].items():
        sources |= {name: (array, layer) for layer, name in enumerate(tensor_names(key, config.num_layers))}

    def tensor(name: str) -> np.ndarray:
        array, layer = sources[name]
        return np.asarray(array) if layer is None else np.asarray(array[layer]).T

    sizes = {name: array.size if layer is None else array.size // config.num_layers for name, (array, layer) in sources.items()}
    write_tensors(folder, sizes, tensor, dtype)
    write_config(folder, config, {"torch_dtype": dtype} | (more or {}))


def write_tensors(folder: Path, sizes: dict[str, int], tensor: Callable[[str], np.ndarray], dtype: str = "float32") -> None:
    """Writes `tensor(name)` for each name of `sizes` in `dtype`.

    `sizes` are numbers of elements. A file has at most SHARD_BYTES.
    """
    folder, dtype = Path(folder), jnp.dtype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or dtype.itemsize * size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= dtype.itemsize * size
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / file, {name: np.asarray(tensor(name), dtype) for name in names})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": dtype.itemsize * sum(sizes.values())}, "weight_map": weight_map}
        write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def save_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file with default permissions.

    Safetensors alone makes it readable to its owner only.
    """
    file.touch()
    mode = file.stat().st_mode
    # save_file ignores the strides of an array; transformers requires the metadata.
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, file, metadata={"format": "pt"})
    file.chmod(mode)


def _weight_map(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The only weight file, or the index of several, and the file of each tensor."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return whole, dict.fromkeys(_open(whole).keys(), whole)
    if not index.exists():
        raise UserError(f"{whole} is missing; weights are read as safetensors only (no pytorch_model.bin).")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return index, {name: folder / file for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = explain(error, "download it again")
        raise UserError(f"{index} cannot be read as the index of a sharded model {what}.") from error


def _open(file: Path) -> safe_open:
    """Opens `file` and reads its header, which must account for every byte: a truncated file is an error."""
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors {explain(error, 'download it again')}.") from error
