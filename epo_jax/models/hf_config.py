"""Converts between a Hugging Face `config.json` and a `DecoderConfig`."""

import json
from pathlib import Path

from epo_jax.common.errors import UserError, explain
from epo_jax.common.files import write_atomically
from epo_jax.models.decoder import DecoderConfig
from epo_jax.models.rope import SCALINGS

_FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}

# The only supported value of each key, if it is present and not null.
_ONLY = {"hidden_act": "silu", "quantization_config": None, "partial_rotary_factor": 1.0, "is_causal": True}


def read_config(folder: Path, dtype: str, remat: str) -> DecoderConfig:
    """The decoder that `folder`/config.json describes.

    Args:
        folder: a Hugging Face model folder.
        dtype: compute dtype; that of the file is the type of the stored weights.
        remat: what the backward pass recomputes, as in `DecoderConfig`.

    Raises:
        UserError: the file is missing or damaged, or the model is not supported.
    """
    path = Path(folder) / "config.json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing, so {folder} is not a Hugging Face model folder{_other(folder)}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON {explain(error, 'download it again')}.") from error
    family = stated.get("model_type") if isinstance(stated, dict) else None
    if family not in _FAMILIES:
        raise UserError(f"{path}: model_type={family!r} is not supported; choose a model of type {' or '.join(_FAMILIES)}.")
    if stated.get("sliding_window", 0) is None:  # the same as off
        stated["use_sliding_window"] = False
    stated = {key: value for key, value in stated.items() if value is not None}
    for key, only in _ONLY.items():
        if stated.get(key, only) != only:
            raise UserError(f"{path}: {key}={stated[key]!r} is not supported (only {only!r} is); choose another model.")

    def positive(key: str, kind: type[int] | type[float], value):
        if not isinstance(value, (int, kind)) or isinstance(value, bool) or value <= 0:
            raise UserError(f"{path}: {key}={value!r} must be a positive {'whole ' * (kind is int)}number.")
        return kind(value)

    def size(key: str, default=None) -> int:
        return positive(key, int, stated.get(key, default))

    def flag(key: str) -> bool:
        if not isinstance(value := stated.get(key, False), bool):
            raise UserError(f"{path}: {key}={value!r} must be true or false.")
        return value

    width, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(f"{path}: num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}.")
    head_dim = size("head_dim", 128 if family == "qwen3" else width // heads)
    if head_dim % 2 or ("head_dim" not in stated and family != "qwen3" and width % heads):
        raise UserError(f"{path}: hidden_size={width} and num_attention_heads={heads} give no even head_dim; state it.")
    theta, scaling = _rope(path, stated)
    attention_bias = family != "qwen2" and flag("attention_bias")
    return DecoderConfig(
        vocab_size=size("vocab_size"),
        d_model=width,
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        d_ff=size("intermediate_size"),
        rope_theta=positive("rope_theta", float, theta),
        norm_eps=positive("rms_norm_eps", float, stated.get("rms_norm_eps", 1e-6)),
        tie_embeddings=flag("tie_word_embeddings"),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=family == "llama" and flag("mlp_bias"),
        qk_norm=family == "qwen3",
        rope_scaling=scaling,
        windows=_windows(path, stated, size) if family != "llama" and flag("use_sliding_window") else (),
        max_positions=size("max_position_embeddings", 2048 if family == "llama" else 32768),
        dtype=dtype,
        remat=remat,
    )


def _other(folder: Path) -> str:
    """The end of a sentence: a suggestion for a folder without config.json."""
    if files := sorted(Path(folder).glob("*.gguf")):
        return f"; name one of its GGUF files in config.model.path, such as {files[0]}"
    if (Path(folder) / "adapter_config.json").exists():
        return "; it holds adapters: merge them into their base model and name the result"
    return ""


def _rope(path: Path, stated: dict) -> tuple:
    """(theta, scaling) from rope_theta and rope_scaling or, since transformers 5, from rope_parameters."""
    found = [_rope_of_table(path, stated, key) for key in ("rope_scaling", "rope_parameters") if stated.get(key)]
    if found[1:] and found[0] != found[1]:
        raise UserError(f"{path}: rope_scaling and rope_parameters disagree; keep the one that the model was made with.")
    return found[0] if found else (stated.get("rope_theta", 10_000.0), ())


def _rope_of_table(path: Path, stated: dict, key: str) -> tuple:
    def refused(why: str):
        return UserError(f"{path}: {key}={stated[key]!r} is not supported ({why}); choose another model.")

    if not isinstance(stated[key], dict):
        raise refused("it must be a table of settings")
    rope = {name: value for name, value in stated[key].items() if value is not None}
    theta = rope.pop("rope_theta", stated.get("rope_theta", 10_000.0))
    kind = rope.pop("type", None)
    kind = rope.pop("rope_type", kind) or "default"
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    reads = SCALINGS.get(kind) if isinstance(kind, str) else None
    length = "original_max_position_embeddings"
    if length in (reads or {}):
        # In the table, next to it, or the model's own length.
        beside = stated.get(length, rope.get(length, stated.get("max_position_embeddings")))
        if beside is not None and rope.setdefault(length, beside) != beside:
            raise refused(f"{length}={beside} beside it says something else")
    if reads is None or rope.keys() - reads or any(v is ... and k not in rope for k, v in reads.items()):
        raise refused(f"rotary positions of type {', '.join(SCALINGS)} with their own settings are")
    for name, value in rope.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise refused(f"{name} must be a positive number")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise refused("low_freq_factor must be below high_freq_factor")
    return theta, () if kind == "default" else tuple(sorted({"rope_type": kind, **rope}.items()))


def _windows(path: Path, stated: dict, size) -> tuple[int, ...]:
    """The window of each layer of a Qwen model; () if none has one."""
    layers = size("num_hidden_layers")
    window, full = size("sliding_window", 4096), stated.get("max_window_layers", 28)
    kinds = stated.get("layer_types", ["full_attention" if i < full else "sliding_attention" for i in range(layers)])
    if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{path}: layer_types={kinds!r} must be full_attention or sliding_attention for each of {layers} layers.")
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def write_config(folder: Path, config: DecoderConfig, more: dict | None = None) -> None:
    """Writes `folder`/config.json for `read_config` and transformers, with `more` additional keys."""
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias and not config.o_bias else "llama"
    stated = {
        "architectures": [_FAMILIES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,  # LlamaConfig's default is 1
        "torch_dtype": "float32",
    }
    if config.rope_scaling:
        stated["rope_scaling"] = dict(config.rope_scaling)
    if family != "qwen2":
        stated["attention_bias"] = config.o_bias
    if family == "llama":
        stated["mlp_bias"] = config.mlp_bias
    if config.windows:
        stated |= {
            "use_sliding_window": True,
            "sliding_window": max(config.windows),
            "max_window_layers": next(layer for layer, window in enumerate(config.windows) if window),
            "layer_types": ["sliding_attention" if window else "full_attention" for window in config.windows],
        }
    write_atomically(Path(folder) / "config.json", json.dumps(stated | (more or {}), indent=2) + "\n")
