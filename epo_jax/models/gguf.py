"""GGUF files, converted once into a Hugging Face folder: weights dequantised to float32, the tokenizer rebuilt."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from epo_jax.errors import UserError
from epo_jax.models.decoder import DecoderConfig
from epo_jax.models.hf_config import write_config
from epo_jax.models.rope import frequencies
from epo_jax.models.weights import write_tensors

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

# The frequencies of Llama 3.1 and later lie in a GGUF as a table only; this is what every such model was made with.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def converted(path: Path) -> Path:
    """The Hugging Face folder made of the GGUF file `path`, in the cache ($EPO_JAX_DATA, else ~/.cache/epo_jax).

    A tokenizer.json beside the file is preferred to the vocabulary inside it.

    Raises:
        UserError: the file is missing, damaged, or holds a model, a tokenizer or a quantisation that is not known.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config.model.path={str(path)!r}: there is no such file; give the path of a GGUF file that exists.")
    told = path.stat()
    digest = hashlib.sha256(f"{path.resolve()} {told.st_size} {told.st_mtime_ns}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("EPO_JAX_DATA") or "~/.cache/epo_jax").expanduser() / "models"
    folder = cache / f"{path.stem}-{digest}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as made:
            _convert(path, Path(made) / "model")
            with contextlib.suppress(OSError):  # another process was quicker
                (Path(made) / "model").rename(folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    import gguf  # only such a file needs it

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise UserError(f"{path} cannot be read as GGUF ({error}); download it again.") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, reader, tensors)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if _architecture(reader) == "llama" else {}
    names = {_name(path, name): name for name in tensors if name != "rope_freqs.weight"}

    def tensor(name: str) -> np.ndarray:
        source = tensors[names[name]]
        try:
            array = gguf.quants.dequantize(source.data, source.tensor_type)
        except NotImplementedError:
            kind = source.tensor_type.name
            raise UserError(f"{path}: tensor {source.name} is stored as {kind}; take a file of another quantisation.") from None
        rotated = heads.get(names[name].split(".")[-2])
        if rotated:  # llama.cpp turns neighbouring elements of a head, Hugging Face those half a head apart
            array = array.reshape(rotated, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array

    write_tensors(folder, {name: int(tensors[source].n_elements) for name, source in names.items()}, tensor)
    _tokenizer(path, reader, folder)
    write_config(folder, config)


def _architecture(reader) -> str:
    return _value(reader, "general.architecture")


def _value(reader, key: str, default=None):
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _name(path: Path, name: str) -> str:
    """The Hugging Face name of a tensor."""
    *layer, module, kind = name.split(".")
    if module not in _TENSORS or kind not in ("weight", "bias"):
        raise UserError(f"{path}: tensor {name} belongs to no Qwen2, Qwen3 or Llama model; choose another model.")
    return f"{f'model.layers.{layer[1]}.' if layer else ''}{_TENSORS[module]}.{kind}"


def _config(path: Path, reader, tensors: dict) -> DecoderConfig:
    family = _architecture(reader)
    if family not in ("llama", "qwen2", "qwen3"):
        raise UserError(f"{path}: general.architecture={family!r} is not supported; choose a qwen2, qwen3 or llama model.")

    def value(key: str, default=None):
        found = _value(reader, f"{family}.{key}", default)
        if found is None:
            raise UserError(f"{path} lacks {family}.{key}; download it again.")
        return found

    width, heads = value("embedding_length"), value("attention.head_count")
    head_dim, theta = value("attention.key_length", width // heads), value("rope.freq_base", 10_000.0)
    kind, scaling = value("rope.scaling.type", "none"), {}
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": value("rope.scaling.factor")}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = value("rope.scaling.original_context_length")
    elif kind != "none":
        raise UserError(f"{path}: {family}.rope.scaling.type={kind!r} is not supported; choose another model.")
    if "rope_freqs.weight" in tensors:
        divisors = np.asarray(tensors["rope_freqs.weight"].data, np.float32)
        scaling = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
        made = frequencies(head_dim, theta, {})[0] / frequencies(head_dim, theta, scaling)[0]
        if not np.allclose(divisors, made, rtol=1e-3):
            raise UserError(f"{path}: tensor rope_freqs.weight is not that of Llama 3; choose another model.")
    return DecoderConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        d_model=width,
        num_layers=value("block_count"),
        num_heads=heads,
        num_kv_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        d_ff=value("feed_forward_length"),
        rope_theta=theta,
        norm_eps=value("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=family == "qwen3",
        rope_scaling=tuple(sorted(scaling.items())),
        max_positions=value("context_length"),
    )


def _tokenizer(path: Path, reader, folder: Path) -> None:
    """Puts tokenizer.json and tokenizer_config.json into `folder`: those beside the GGUF, or made of its vocabulary."""
    beside = [path.parent / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    if beside[0].exists():
        for file in beside:
            if file.exists():
                shutil.copy(file, folder)
        return
    kind, words = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "qwen2": [pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", "")), "isolated"), byte_level],
        "llama-bpe": [pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", "{1,3}")), "isolated"), byte_level],
    }
    if kind != "gpt2" or words not in pieces:
        raise UserError(
            f"{path}: its tokenizer ({kind!r}, {words!r}) cannot be rebuilt; put the model's tokenizer.json and "
            "tokenizer_config.json beside the file."
        )
    tokens, types = _value(reader, "tokenizer.ggml.tokens"), _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=words == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(pieces[words])
    backend.decoder = decoders.ByteLevel()
    if words == "qwen2":
        backend.normalizer = normalizers.NFC()
    kinds = {_SPECIAL: True, _USER_DEFINED: False}
    added = [(token, kinds[kind]) for token, kind in zip(tokens, types, strict=True) if kind in kinds]
    backend.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in added])
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": _value(reader, "tokenizer.chat_template")}
    for name in ("bos", "eos"):
        number = _value(reader, f"tokenizer.ggml.{name}_token_id")
        if number is not None:
            about[f"{name}_token"] = tokens[number]
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
