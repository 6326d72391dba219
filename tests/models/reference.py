"""Tiny random checkpoints with every odd feature of their families, and the logits that transformers computes from them.

    python tests/models/reference.py

writes reference_logits.npz. Only this script needs torch.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FILE = Path(__file__).with_name("reference_logits.npz")
TOKENS = np.random.default_rng(0).integers(0, 61, (1, 48))

_SIZES = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip
CASES = {
    # The first layer sees everything, the others a window.
    "qwen2": _SIZES | {
        "model_type": "qwen2", "rope_theta": 500.0, "tie_word_embeddings": True, "use_sliding_window": True,
        "sliding_window": 9, "max_window_layers": 1, "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "qwen2.5": _SIZES | {
        "model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": False,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    # Heads wider than hidden_size / num_attention_heads.
    "qwen3": _SIZES | {
        "model_type": "qwen3", "rope_theta": 1e4, "head_dim": 16, "tie_word_embeddings": False, "attention_bias": True,
        "use_sliding_window": False,
    },
    "llama3": _SIZES | {
        "model_type": "llama", "rope_theta": 1e4, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "smollm2": _SIZES | {"model_type": "llama", "rope_theta": 1e5, "tie_word_embeddings": True},
}  # fmt: skip


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of that name; the sizes make logits of about 40."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(0.0, 1.0, shape)
    if "norm" in name:
        return (1.0 + 0.3 * noise + (name == "model.norm.weight")).astype(np.float32)
    embedding = name in ("model.embed_tokens.weight", "lm_head.weight")
    return (noise if embedding or name.endswith("bias") else noise * 1.5 * shape[-1] ** -0.5).astype(np.float32)


def write(folder: Path, case: str, shapes: dict[str, tuple[int, ...]]) -> Path:
    """The checkpoint of a case, with tensors of the given names and shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CASES[case]))
    tensors = {name: tensor(name, shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def model(case: str):
    """The case as a transformers model in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    stated = dict(CASES[case])
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(stated.pop("model_type"), **stated)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.from_numpy(tensor(name, tuple(parameter.shape))))
    return made


def logits(made) -> np.ndarray:
    import torch

    with torch.no_grad():
        return made(torch.from_numpy(TOKENS)).logits.numpy()


if __name__ == "__main__":
    np.savez_compressed(FILE, **{case: logits(model(case)) for case in CASES})
