"""Converts a GGUF file into a Hugging Face folder.

Weights are dequantized to float32, and the tokenizer is rebuilt.
"""

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors import SafetensorError
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from epo_jax.common import progress
from epo_jax.common.errors import UserError, explain
from epo_jax.common.files import cache_folder
from epo_jax.models.decoder import DecoderConfig
from epo_jax.models.hf_config import write_config
from epo_jax.models.rope import frequencies
from epo_jax.models.weights import expected_shapes, write_tensors

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

# A GGUF has the frequencies of Llama 3.1 and later as a table only; all such models share these settings.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPECIAL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def converted(path: Path) -> Path:
    """The Hugging Face folder of the GGUF file `path`.

    The folder is in the cache ($EPO_JAX_DATA, else ~/.cache/epo_jax). `path` may be any part of a model in parts
    (NAME-00001-of-00003.gguf). A tokenizer.json next to the file takes precedence over the vocabulary in it. A folder appears
    in the cache only when it is complete.

    Raises:
        UserError: the file or a part is missing or damaged, or has an unsupported model, tokenizer or quantization.
    """
    parts = _parts(Path(path))
    stats = [(part.resolve(), part.stat()) for part in parts]
    identity = " ".join(f"{part} {stat.st_size} {stat.st_mtime_ns}" for part, stat in stats)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    cache = cache_folder() / "models"
    folder = cache / f"{parts[0].stem}-{digest}"
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as made, progress.shown(f"converting {parts[0].name}, once"):
                _convert(parts, Path(made) / "model")
                with contextlib.suppress(OSError):  # another process was faster
                    (Path(made) / "model").rename(folder)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{parts[0]} cannot be converted in {cache} ({error}); set EPO_JAX_DATA to a folder with room for its weights "
                "in float32."
            ) from error
    return folder


def _parts(path: Path) -> list[Path]:
    """All files of the model to which `path` belongs."""
    if match := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name):
        parts = [path.with_name(f"{match[1]}-{number:05d}-of-{match[2]}.gguf") for number in range(1, int(match[2]) + 1)]
    else:
        parts = [path]
    for part in [path, *parts]:
        if not part.is_file():
            raise UserError(f"config.model.path={str(path)!r}: there is no such file as {part}; give one that exists.")
    return parts


def _read(parts: list[Path]) -> tuple[Any, dict[str, Any]]:
    """(reader of the first part, which has the metadata; tensors of all parts by name)."""
    import gguf  # needed for such files only

    readers, tensors = [], {}
    for number, part in enumerate(parts):
        try:
            reader = gguf.GGUFReader(part)
            place, count = _value(reader, "split.no", 0), _value(reader, "split.count", 1)
        except (ValueError, OSError, IndexError, KeyError) as error:
            advice = "download it again, or take a file of another quantization"
            raise UserError(f"{part} cannot be read as GGUF {explain(error, advice)}.") from error
        if (place, max(count, 1)) != (number, len(parts)):
            raise UserError(
                f"{part} is part {place + 1} of {count} of a model, but its name says {number + 1} of {len(parts)}; give the "
                "parts the names that they had (NAME-00001-of-00002.gguf, ...), in one folder."
            )
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise UserError(f"{part} holds tensor {tensor.name}, which an earlier part holds too; download the parts again.")
            tensors[tensor.name] = tensor
        readers.append(reader)
    total = _value(readers[0], "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise UserError(f"{parts[0]} lists {total} tensors, but there are {len(tensors)}; download it again.")
    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors.values()}.items():
        try:
            gguf.quants.dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            raise UserError(
                f"{parts[0]}: tensor {tensor.name} is stored as {kind.name}; take a file of another quantization."
            ) from None
    return readers[0], tensors


def _convert(parts: list[Path], folder: Path) -> None:
    import gguf

    path = parts[0]
    reader, tensors = _read(parts)
    config = _config(path, reader, tensors)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if _architecture(reader) == "llama" else {}
    names = {_name(path, name): name for name in tensors if name != "rope_freqs.weight"}
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in names or tuple(map(int, tensors[names[name]].shape[::-1])) != shape:
            found = f"of shape {tensors[names[name]].shape[::-1].tolist()}" if name in names else "missing"
            raise UserError(f"{path}: the tensor for {name} {list(shape)} is {found}; download it again.")
    for name in names.keys() - expected.keys():
        raise UserError(f"{path}: tensor {names[name]} is not part of the model that its metadata describes; download it again.")

    def tensor(name: str) -> np.ndarray:
        source = tensors[names[name]]
        array = gguf.quants.dequantize(source.data, source.tensor_type)
        rotated = heads.get(names[name].split(".")[-2])
        if rotated:  # llama.cpp rotates neighboring elements of a head, Hugging Face elements half a head apart
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
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} lacks tensor token_embd.weight; download it again.")
    if family not in ("llama", "qwen2", "qwen3"):
        raise UserError(f"{path}: general.architecture={family!r} is not supported; choose a qwen2, qwen3 or llama model.")

    def value(key: str, default=None):
        found = _value(reader, f"{family}.{key}", default)
        if found is None:
            raise UserError(f"{path} lacks {family}.{key}; download it again.")
        return found

    width, heads = value("embedding_length"), value("attention.head_count")
    head_dim, theta = value("attention.key_length", width // heads), value("rope.freq_base", 10_000.0)
    kind = value("rope.scaling.type", "none")
    scaling: dict[str, Any] = {}
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
    """Writes tokenizer.json and tokenizer_config.json to `folder`: those next to the GGUF, or rebuilt from its vocabulary."""
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
