"""Model folders as published models have them, with one peculiarity each and a few thousand weights.

Names, shapes and settings are written out here as transformers writes them, apart from the code that reads them.
"""

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from tests.models import templates

TOKENS, ROWS = 448, 512  # ids that every tokenizer here defines, rows of every embedding

_SIZES = {
    "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip
QWEN2 = _SIZES | {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e4, "tie_word_embeddings": True,
    "use_sliding_window": False, "sliding_window": 512, "max_window_layers": 1, "attention_dropout": 0.0,
}  # fmt: skip
QWEN3 = _SIZES | {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 12, "attention_bias": False,
    "rope_scaling": None, "rope_theta": 1e6, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None,
}  # fmt: skip
LLAMA = _SIZES | {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "pretraining_tp": 1, "bos_token_id": 0, "rope_theta": 5e5,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A model folder.

    Attributes:
        stated: its config.json.
        template: its tokenizer, one of templates.CASES.
        head: a tied model stores its head all the same.
        bare: tensors have no prefix, as those of a decoder without an output head's class around it.
        shards: files that hold the weights; with `twice`, the embedding is in the first and in the last.
        dtype: of the stored weights.
        slow: vocab.json and merges.txt in place of tokenizer.json.
    """

    stated: dict
    template: str = "qwen2.5"
    head: bool = False
    bare: bool = False
    shards: int = 1
    twice: bool = False
    dtype: str = "float32"
    slow: bool = False


CASES = {
    "qwen2": Case(QWEN2),
    "a tied model that stores its head": Case(QWEN2, head=True),
    "shards, one tensor in two": Case(QWEN2, shards=3, twice=True),
    "the decoder alone": Case(QWEN2, bare=True, shards=2),
    "float16": Case(QWEN2, dtype="float16"),
    "vocab.json and merges.txt": Case(QWEN2, slow=True),
    "qwen3": Case(QWEN3, "qwen3"),
    "yarn": Case(QWEN2 | {"rope_scaling": YARN, "tie_word_embeddings": False}),
    "linear positions, windows": Case(
        QWEN2 | {"rope_scaling": {"type": "linear", "factor": 2.0}, "use_sliding_window": True, "sliding_window": 24}
    ),
    "llama 3.1": Case(
        {k: v for k, v in LLAMA.items() if k != "rope_theta"} | {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
        "llama 3.1",
    ),
    "llama with every bias": Case(LLAMA | {"attention_bias": True, "mlp_bias": True}, "tinyllama"),
    "a thought that the prompt opens": Case(QWEN2, "r1 distill"),
    "tags that are special tokens": Case(QWEN2, "tags are special"),
    "a base model": Case(QWEN2, "chatml base"),
}


def tensors(stated: dict) -> dict[str, np.ndarray]:
    """Random weights under the names that transformers gives them, for logits of a few nats."""
    width, rows, hidden = stated["hidden_size"], stated["vocab_size"], stated["intermediate_size"]
    head = stated.get("head_dim", width // stated["num_attention_heads"])
    heads, kv = stated["num_attention_heads"] * head, stated["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    if not stated["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (rows, width)
    family = stated["model_type"]
    attention_bias = stated.get("attention_bias", False)
    for layer in range(stated["num_hidden_layers"]):
        sizes = {
            "self_attn.q_proj": (heads, width, attention_bias or family == "qwen2"),
            "self_attn.k_proj": (kv, width, attention_bias or family == "qwen2"),
            "self_attn.v_proj": (kv, width, attention_bias or family == "qwen2"),
            "self_attn.o_proj": (width, heads, attention_bias),
            "mlp.gate_proj": (hidden, width, stated.get("mlp_bias", False)),
            "mlp.up_proj": (hidden, width, stated.get("mlp_bias", False)),
            "mlp.down_proj": (width, hidden, stated.get("mlp_bias", False)),
        }
        own = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
        if family == "qwen3":
            own |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        for name, (out, into, bias) in sizes.items():
            own |= {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return {name: _tensor(name, shape) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    noise = 1 + 0.3 * noise if "norm" in name else noise * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
    return noise.astype(np.float16).astype(np.float32)


def write(folder: Path, case: Case) -> Path:
    _write_tokenizer(folder, case)
    (folder / "config.json").write_text(json.dumps(case.stated))
    stored = {name: tensor.astype(case.dtype) for name, tensor in tensors(case.stated).items()}
    if case.head:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].copy()
    if case.bare:
        stored = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    files = [f"model-{i + 1:05d}-of-{case.shards:05d}.safetensors" for i in range(case.shards)]
    files = files if case.shards > 1 else ["model.safetensors"]
    held = {file: {name: stored[name] for name in list(stored)[i :: case.shards]} for i, file in enumerate(files)}
    if case.shards > 1:
        index = {name: file for file, part in held.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if case.twice:
        held[files[-1]] |= {"model.embed_tokens.weight": stored["model.embed_tokens.weight"]}
    for file, part in held.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    return folder


def _write_tokenizer(folder: Path, case: Case) -> None:
    """That of the template's case, filled up to TOKENS so that all models of a kind share their programs."""
    templates.write(folder, templates.CASES[case.template])
    path = folder / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_tokens([f"<filler {i}>" for i in range(TOKENS - backend.get_vocab_size())])
    backend.save(str(path))
    if case.slow:
        stored, about = json.loads(path.read_text()), json.loads((folder / "tokenizer_config.json").read_text())
        path.unlink()
        (folder / "vocab.json").write_text(json.dumps(stored["model"]["vocab"]))
        merges = [" ".join(merge) for merge in stored["model"]["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        added = {token.pop("id"): token for token in stored["added_tokens"]}
        about |= {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
