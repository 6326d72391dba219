"""Hugging Face model folders, in and out: `config.json` and safetensors on disk, `DecoderConfig` and `Params` in memory.

A checkpoint holds every projection of every layer by itself, as [out, in]; `Params` stacks the layers and keeps [in, out].
`_views` alone knows both: under the name of each tensor of a checkpoint it gives the piece of `Params` that belongs to it, turned
as in the file. Loading assigns to these views, saving copies them out.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from epo_jax.errors import UserError
from epo_jax.files import write_atomically
from epo_jax.models.decoder import DecoderConfig, Params, init_params

_TENSORS = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
_LAYER_TENSORS = {
    **{f"{x}_proj": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"{x}_bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
    **{f"{x}_proj": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    "input_norm": "input_layernorm.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
}

# The value that each key must have, where it is there and not null, for the decoder to compute what the model was trained as.
_ONLY = {
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False, "quantization_config": None},
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None},
}

# What a run needs of a hub repository: no pickles, no weights of other frameworks.
_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]


def resolve(path: str) -> Path:
    """The model folder that `path` means: a local folder, or else a name on the Hugging Face hub, fetched into its cache.

    Raises:
        UserError: there is no such folder, and the hub does not know the name or cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    import huggingface_hub  # only a pretrained model needs it

    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=_FILES))
    except Exception as error:  # its own errors and those of its HTTP and transfer libraries have no common base
        reason = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")[:200]
        raise UserError(
            f"config.model.path={path!r} is no local folder and cannot be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); give a local folder in config.model.path or download the model first."
        ) from error


def read_config(folder: Path, dtype: str, remat: bool) -> DecoderConfig:
    """The decoder that `folder`/config.json describes: Qwen2, or Llama with plain rotary positions and no biases.

    Args:
        folder: a Hugging Face model folder.
        dtype: compute dtype; the file's own says how the weights are stored.
        remat: recompute activations in the backward pass.

    Raises:
        UserError: the file is missing or damaged, or the model is of another kind.
    """
    path = Path(folder) / "config.json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing, so {folder} is not a Hugging Face model folder.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); download it again.") from error
    family = stated.get("model_type") if isinstance(stated, dict) else None
    if family not in _ONLY:
        raise UserError(f"{path}: model_type={family!r} is not supported; choose a model of type {' or '.join(_ONLY)}.")
    stated = {key: value for key, value in stated.items() if value is not None}
    for key, only in _ONLY[family].items():
        if stated.get(key, only) != only:
            raise UserError(f"{path}: {key}={stated[key]!r} is not supported (only {only!r} is); choose another model.")
    # Rotary settings lie at the top level (rope_theta, rope_scaling) or, since transformers 5, together in rope_parameters.
    theta = stated.get("rope_theta", 10_000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = stated.get(key, {})
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UserError(f"{path}: {key}={rope!r} is not supported (plain rotary positions are); choose another model.")
        theta = rope.get("rope_theta", theta)

    def positive(key: str, kind: type, value):
        if not isinstance(value, (int, kind)) or isinstance(value, bool) or value <= 0:
            raise UserError(f"{path}: {key}={value!r} must be a positive {'whole ' * (kind is int)}number.")
        return kind(value)

    def size(key: str, default=None) -> int:
        return positive(key, int, stated.get(key, default))

    width, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(f"{path}: num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}.")
    return DecoderConfig(
        vocab_size=size("vocab_size"),
        d_model=width,
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size("head_dim", width // heads),
        d_ff=size("intermediate_size"),
        rope_theta=positive("rope_theta", float, theta),
        norm_eps=positive("rms_norm_eps", float, stated.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(stated.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        dtype=dtype,
        remat=remat,
    )


def load_params(folder: Path, config: DecoderConfig) -> Params:
    """The weights of `folder`, in one safetensors file or several, as host arrays in float32.

    Names, shapes and types are checked before the first weight is read. Memory peaks at the result and one tensor.

    Raises:
        UserError: a file is missing or cut short, or a tensor is missing, unknown, or of another shape or type.
    """
    folder = Path(folder)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    params = jax.tree.map(lambda s: np.empty(s.shape, np.float32), shapes)
    views = _views(params)
    source, file_of = _weight_map(folder)
    for name in file_of:
        # Rotary frequencies, which old Llama checkpoints carry along, follow from the config.
        if name not in views and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{file_of[name]}: {folder / 'config.json'} has no place for tensor {name}; mend that config.json.")
    for name in views:
        if name not in file_of:
            raise UserError(f"{source} lacks tensor {name}; download the model again.")
    opened = {file: _open(file) for file in sorted(set(file_of.values()))}
    for name, view in views.items():
        file = file_of[name]
        try:
            stored = opened[file].get_slice(name)
        except SafetensorError:
            raise UserError(f"{file} lacks tensor {name}; download the model again.") from None
        if tuple(stored.get_shape()) != view.shape:
            raise UserError(
                f"{file}: tensor {name} has shape {stored.get_shape()}, but {folder / 'config.json'} asks for "
                f"{list(view.shape)}; take both from the same model."
            )
        if stored.get_dtype() not in ("F32", "F16", "BF16"):
            raise UserError(f"{file}: tensor {name} is stored as {stored.get_dtype()}; take weights in F32, F16 or BF16.")
    for name, view in views.items():
        view[...] = opened[file_of[name]].get_tensor(name)
    return params


def save_params(folder: Path, config: DecoderConfig, params: Params) -> None:
    """Writes config.json and model.safetensors (float32), which `load_params` and transformers read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    views = _views(jax.tree.map(lambda x: np.asarray(x, np.float32), params))
    # save_file writes the memory behind an array and takes no notice of strides; transformers insists on the metadata.
    tensors = {name: np.ascontiguousarray(view) for name, view in views.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    family, architecture = ("qwen2", "Qwen2ForCausalLM") if config.qkv_bias else ("llama", "LlamaForCausalLM")
    stated = {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
    }
    write_atomically(folder / "config.json", json.dumps(stated, indent=2) + "\n")


def _views(params: Params) -> dict[str, np.ndarray]:
    """Name in a checkpoint -> that tensor, oriented as there, as a view into the numpy arrays of `params`."""
    views = {_TENSORS[key]: array for key, array in params.items() if key != "layers"}
    for key, stack in params["layers"].items():
        for layer, array in enumerate(stack):
            views[f"model.layers.{layer}.{_LAYER_TENSORS[key]}"] = array.T  # a vector is its own transpose
    return views


def _weight_map(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The file that lists the tensors (the only weight file, or the index of several), and the file of each tensor."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return whole, dict.fromkeys(_open(whole).keys(), whole)
    if not index.exists():
        raise UserError(f"{whole} is missing; weights are read as safetensors only (no pytorch_model.bin).")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return index, {name: folder / file for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read as the index of a sharded model; download it again.") from error


def _open(file: Path) -> safe_open:
    """`file` with its header read; the header must account for every byte, so a file cut short does not open."""
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error}); download it again.") from error
