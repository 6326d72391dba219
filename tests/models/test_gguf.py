"""GGUF files made with the `gguf` package, which is llama.cpp's own, and read back as a run reads them."""

import functools

import gguf
import jax
import numpy as np
import pytest

from epo_jax.common.errors import UserError
from epo_jax.models import hf_config, hub, weights
from epo_jax.models.decoder import DecoderConfig, init_params
from epo_jax.models.rope import frequencies
from epo_jax.models.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLAMA = DecoderConfig(
    262, 64, 2, 4, 2, 16, 96, rope_theta=5e5, norm_eps=1e-5, tie_embeddings=False, qkv_bias=False,
    rope_scaling=tuple(sorted(LLAMA3.items())), max_positions=512,
)  # fmt: skip
QWEN3 = DecoderConfig(262, 64, 2, 4, 2, 32, 96, norm_eps=1e-5, qkv_bias=False, qk_norm=True, max_positions=512)
NAMES = {hf: name for name, hf in {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}.items()}  # fmt: skip


def tensors(config):
    """A checkpoint's tensors under their Hugging Face names."""
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    rng, found = np.random.default_rng(0), {}
    for key, shape in shapes.items():
        if key != "layers":
            found[weights.tensor_names(key)[0]] = rng.normal(size=shape.shape).astype(np.float32)
    for key, shape in shapes["layers"].items():
        for name in weights.tensor_names(key, config.num_layers):
            found[name] = rng.normal(size=shape.shape[:0:-1]).astype(np.float32)
    return found


def permuted(tensor, heads):
    """Rows as llama.cpp's converter orders those of a Llama's queries and keys."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def write(path, config, stored, architecture, kinds=None, pre="qwen2", **split):
    """A GGUF of `stored`, quantised where `kinds` (Hugging Face name -> quantisation) says; returns what it stands for."""
    writer = gguf.GGUFWriter(path, architecture, **split)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    alphabet = sorted(load_alphabet())
    tokens = [*alphabet, "Ġa", "Ġap", "<|im_start|>", "<|im_end|>", "pad", "odd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["Ġ a", "Ġa p"])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(TEMPLATE)
    meant = {}
    for name, tensor in stored.items():
        module, kind = name.removeprefix("model.layers.").rsplit(".", 1)
        layer = module.partition(".")[0] if name.startswith("model.layers.") else None
        ours = f"blk.{layer}.{NAMES[module.partition('.')[2]]}" if layer else NAMES[module]
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(module.rpartition(".")[2])
        turned = heads and architecture == "llama"
        data, meant[name] = permuted(tensor, heads) if turned else tensor, tensor
        quantisation = (kinds or {}).get(name)
        if quantisation is not None:
            packed = gguf.quants.quantize(data, quantisation)
            writer.add_tensor(f"{ours}.{kind}", packed, raw_dtype=quantisation)
            meant[name] = gguf.quants.dequantize(packed, quantisation)  # of a tensor that is not turned
        else:
            writer.add_tensor(f"{ours}.{kind}", data)
    if config.rope_scaling:
        plain, stretched = (frequencies(config.head_dim, config.rope_theta, s)[0] for s in ({}, dict(config.rope_scaling)))
        writer.add_tensor("rope_freqs.weight", (plain / stretched).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def load_alphabet():
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EPO_JAX_DATA", str(tmp_path / "cache"))


@pytest.mark.parametrize(("architecture", "config"), [("llama", LLAMA), ("qwen3", QWEN3)])
def test_weights_config_and_tokenizer_come_out_as_they_went_in(tmp_path, architecture, config):
    kinds = {
        "model.embed_tokens.weight": gguf.GGMLQuantizationType.Q8_0,
        "model.layers.1.mlp.up_proj.weight": gguf.GGMLQuantizationType.Q4_1,
        "model.layers.0.mlp.gate_proj.weight": gguf.GGMLQuantizationType.F16,
    }
    meant = write(tmp_path / "model.gguf", config, tensors(config), architecture, kinds)
    folder = hub.resolve(str(tmp_path / "model.gguf"))
    read = hf_config.read_config(folder, "float32", "none")
    assert read.norm_eps == pytest.approx(config.norm_eps)
    assert DecoderConfig(**{**read.__dict__, "norm_eps": config.norm_eps}) == config
    params = weights.load_params(folder, read)
    np.testing.assert_array_equal(params["embedding"], meant["model.embed_tokens.weight"])
    for key, stack in params["layers"].items():
        for name, tensor in zip(weights.tensor_names(key, config.num_layers), stack, strict=True):
            np.testing.assert_array_equal(tensor, meant[name].T, name)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.first("an apple")
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == "<|im_start|>user an apple<|im_end|><|im_start|>assistant "
    assert tokenizer.backend.id_to_token(tokenizer.stop_id) == "<|im_end|>"
    assert tokenizer.backend.encode(" ap").tokens == ["Ġap"] and tokenizer.vocab_size == 262
    # A second run finds it converted.
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert hub.resolve(str(tmp_path / "model.gguf")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_tokenizer_beside_the_file_is_preferred(tmp_path):
    write(tmp_path / "model.gguf", QWEN3, tensors(QWEN3), "qwen3", pre="unheard-of")
    with pytest.raises(UserError, match=r"model\.gguf: .*unheard-of.*tokenizer\.json"):
        hub.resolve(str(tmp_path / "model.gguf"))
    (tmp_path / "tokenizer.json").write_text("theirs")
    assert (hub.resolve(str(tmp_path / "model.gguf")) / "tokenizer.json").read_text() == "theirs"


@pytest.mark.parametrize(
    ("damage", "culprit"),
    [
        (lambda path: path.unlink(), r"model\.gguf.*no such file"),
        (lambda path: path.write_bytes(b"GGML" + path.read_bytes()[4:]), r"model\.gguf cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), r"model\.gguf cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), r"model\.gguf cannot be read"),
        (lambda path: write(path, QWEN3, tensors(QWEN3), "gemma3"), r"general\.architecture='gemma3'"),
    ],
    ids=["missing", "magic", "cut", "header", "architecture"],
)
def test_what_cannot_be_read_is_refused(tmp_path, damage, culprit):
    write(tmp_path / "model.gguf", QWEN3, tensors(QWEN3), "qwen3")
    damage(tmp_path / "model.gguf")
    with pytest.raises(UserError, match=culprit) as refusal:
        hub.resolve(str(tmp_path / "model.gguf"))
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "cache" / "models").glob("*")) if (tmp_path / "cache").exists() else True


def in_parts(folder, config, stored, **split):
    """The parts of a model, its output head in the last one, as llama.cpp splits it."""
    head = {name: tensor for name, tensor in stored.items() if name == "lm_head.weight"}
    ordered = {name: tensor for name, tensor in stored.items() if name not in head} | head
    write(folder / "model.gguf", config, ordered, "llama", split_max_tensors=9, **split)
    return sorted(folder.glob("model-*-of-*.gguf"))


@pytest.mark.parametrize("small_first_shard", [False, True], ids=["tensors in all", "none in the first"])
def test_all_parts_are_read(tmp_path, small_first_shard):
    stored = tensors(LLAMA)
    parts = in_parts(tmp_path, LLAMA, stored, small_first_shard=small_first_shard)
    assert len(parts) == 3 + small_first_shard
    folder = hub.resolve(str(parts[0]))
    config = hf_config.read_config(folder, "float32", "none")
    assert not config.tie_embeddings
    params = weights.load_params(folder, config)
    np.testing.assert_array_equal(params["lm_head"], stored["lm_head.weight"])
    np.testing.assert_array_equal(params["layers"]["q_proj"][1], stored["model.layers.1.self_attn.q_proj.weight"].T)
    assert hub.resolve(str(parts[2])) == folder  # the same model by whichever of its files


@pytest.mark.parametrize(
    ("damage", "culprit"),
    [
        (lambda parts: parts[2].unlink(), r"model-00003-of-00003\.gguf"),
        (lambda parts: parts[2].write_bytes(parts[1].read_bytes()), r"model-00003-of-00003\.gguf is part 2 of 3"),
        (lambda parts: parts[2].write_bytes(b""), r"model-00003-of-00003\.gguf cannot be read"),
        (lambda parts: parts[0].rename(parts[0].with_name("whole.gguf")), r"whole\.gguf is part 1 of 3"),
        (lambda parts: [part.unlink() for part in parts[1:]], r"model-00002-of-00003\.gguf"),
    ],
    ids=["missing", "twice", "empty", "renamed", "the first alone"],
)
def test_parts_that_are_no_whole_are_refused_and_nothing_is_kept(tmp_path, damage, culprit):
    parts = in_parts(tmp_path, LLAMA, tensors(LLAMA))
    damage(parts)
    with pytest.raises(UserError, match=culprit) as refusal:
        hub.resolve(str(parts[0] if parts[0].exists() else tmp_path / "whole.gguf"))
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"up_proj\.weight \[96, 64\] is missing"),
        (lambda t: t.pop("model.embed_tokens.weight"), r"lacks tensor token_embd\.weight"),
        (lambda t: t.update({"model.norm.weight": np.ones(65, np.float32)}), r"model\.norm\.weight \[64\] is of shape \[65\]"),
    ],
    ids=["layer", "embedding", "shape"],
)
def test_a_model_that_lacks_a_tensor_is_refused_before_it_is_converted(tmp_path, change, culprit):
    stored = tensors(QWEN3)
    change(stored)
    write(tmp_path / "model.gguf", QWEN3, stored, "qwen3")
    with pytest.raises(UserError, match=culprit):
        hub.resolve(str(tmp_path / "model.gguf"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_quantization_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """One that the gguf package does not decode, and one that it does not know."""
    write(tmp_path / "model.gguf", QWEN3, tensors(QWEN3), "qwen3", {"model.embed_tokens.weight": gguf.GGMLQuantizationType.Q8_0})
    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(UserError, match=r"token_embd\.weight is stored as Q8_0; take a file of another quantization"):
        hub.resolve(str(tmp_path / "model.gguf"))
    kind = np.uint32(gguf.GGMLQuantizationType.Q8_0).tobytes()
    data, name = (tmp_path / "model.gguf").read_bytes(), b"token_embd.weight"
    after = data.index(name) + len(name) + 4 + 2 * 8  # dimensions
    assert data[after : after + 4] == kind
    (tmp_path / "model.gguf").write_bytes(data[:after] + np.uint32(199).tobytes() + data[after + 4 :])
    with pytest.raises(UserError, match=r"model\.gguf cannot be read as GGUF \(.*199.*; .*take a file of another quantization"):
        hub.resolve(str(tmp_path / "model.gguf"))


def test_a_conversion_that_was_interrupted_is_made_again(tmp_path, monkeypatch):
    write(tmp_path / "model.gguf", QWEN3, tensors(QWEN3), "qwen3")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("epo_jax.models.gguf._tokenizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        hub.resolve(str(tmp_path / "model.gguf"))
    assert not list((tmp_path / "cache" / "models").iterdir())
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device.*set EPO_JAX_DATA"):
        full = OSError(28, "No space left on device")
        patch.setattr("epo_jax.models.gguf.write_tensors", lambda *_: (_ for _ in ()).throw(full))
        hub.resolve(str(tmp_path / "model.gguf"))
    assert (hub.resolve(str(tmp_path / "model.gguf")) / "config.json").exists()
