"""Hugging Face folders: every tensor in its place, nothing lost on the way out and in, everything unfit refused."""

import dataclasses
import json

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from epo_jax.common.errors import UserError
from epo_jax.models import hf_config, hub, weights
from epo_jax.models.decoder import DecoderConfig, bind, init_params

fresh = jax.jit(init_params, static_argnums=0)

# No two sizes alike, so that a tensor in a wrong place or a wrong orientation has a wrong shape.
V, D, L, H, K, d, F = 11, 24, 2, 4, 2, 8, 20
QWEN = {
    "model_type": "qwen2", "vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H,
    "num_key_value_heads": K, "head_dim": d, "intermediate_size": F, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 640, "rope_theta": 500.0, "tie_word_embeddings": True, "use_sliding_window": False,
    "rope_scaling": None,
}  # fmt: skip
LLAMA = {
    **QWEN, "model_type": "llama", "attention_bias": False, "tie_word_embeddings": False, "rope_theta": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def tensors(stated):
    """A checkpoint of random tensors, with names and shapes as transformers writes them."""
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not stated["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for i in range(L):
        layer = {
            "self_attn.q_proj.weight": (H * d, D), "self_attn.k_proj.weight": (K * d, D),
            "self_attn.v_proj.weight": (K * d, D), "self_attn.o_proj.weight": (D, H * d),
            "mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F),
            "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,),
        }  # fmt: skip
        if stated["model_type"] == "qwen2":
            layer |= {f"self_attn.{x}_proj.bias": (n * d,) for x, n in zip("qkv", (H, K, K), strict=True)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    return {name: rng.normal(0.0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder, stated, stored):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(stated))
    save_file(stored, folder / "model.safetensors")
    return folder


def write_shards(folder, stated, stored):
    """The first half of the tensors in one file, the rest in another."""
    names = list(stored)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    write(folder, stated, stored)
    (folder / "model.safetensors").unlink()
    for file, part in halves.items():
        save_file({name: stored[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder):
    return weights.load_params(folder, hf_config.read_config(folder, "float32", "none"))


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def reference_logits(t, tokens):
    """The model written out in numpy on the tensors of the checkpoint, as [out, in]."""

    def norm(x, scale):
        return scale * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def rotate(x):
        angles = np.outer(np.arange(len(tokens)), 500.0 ** -(np.arange(0, d, 2) / d))[:, None]
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)

    x = t["model.embed_tokens.weight"][tokens]
    for i in range(L):
        w = {name.removeprefix(f"model.layers.{i}."): tensor for name, tensor in t.items()}
        y = norm(x, w["input_layernorm.weight"])
        q, k, v = (
            (y @ w[f"self_attn.{n}_proj.weight"].T + w.get(f"self_attn.{n}_proj.bias", 0.0)).reshape(len(tokens), -1, d)
            for n in "qkv"
        )
        k, v = np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)
        scores = np.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / np.sqrt(d)
        scores = np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf)
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", attention, v).reshape(len(tokens), -1)
        x = x + attended @ w["self_attn.o_proj.weight"].T
        y = norm(x, w["post_attention_layernorm.weight"])
        gate = y @ w["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    head = t.get("lm_head.weight", t["model.embed_tokens.weight"])
    return norm(x, t["model.norm.weight"]) @ head.T


@pytest.mark.parametrize("stated", [QWEN, LLAMA], ids=["qwen2", "llama"])
def test_a_checkpoint_computes_what_its_tensors_say(tmp_path, stated):
    stored = tensors(stated)
    config = hf_config.read_config(write(tmp_path, stated, stored), "float32", "full")
    assert config == DecoderConfig(
        V,
        D,
        L,
        H,
        K,
        d,
        F,
        rope_theta=500.0,
        norm_eps=1e-5,
        tie_embeddings=stated is QWEN,
        qkv_bias=stated is QWEN,
        max_positions=640,
        remat="full",
    )
    params = weights.load_params(tmp_path, config)
    np.testing.assert_array_equal(params["layers"]["up_proj"][1], stored["model.layers.1.mlp.up_proj.weight"].T)
    tokens = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    model = bind(config, jax.tree.map(jnp.asarray, params))
    hidden = model(jnp.asarray(tokens, jnp.int32)[None], jnp.arange(8)[None], jnp.ones((1, 8), jnp.int32))
    np.testing.assert_allclose(hidden[0] @ model.output_embedding().T, reference_logits(stored, tokens), atol=1e-4)


@pytest.mark.parametrize(("tie", "bias"), [(True, True), (False, False)])
def test_saving_and_loading_changes_no_bit(tmp_path, tie, bias):
    config = DecoderConfig(V, D, L, H, K, d, F, rope_theta=500.0, norm_eps=1e-5, tie_embeddings=tie, qkv_bias=bias)
    params = fresh(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    weights.save_params(tmp_path / "new" / "folder", config, params)
    assert hf_config.read_config(tmp_path / "new" / "folder", "float32", "none") == config
    loaded = weights.load_params(tmp_path / "new" / "folder", config)
    same(loaded, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


def test_what_is_saved_is_the_checkpoint_it_came_from(tmp_path):
    stored = tensors(LLAMA)
    folder = write(tmp_path / "theirs", LLAMA, stored)
    weights.save_params(tmp_path / "ours", hf_config.read_config(folder, "float32", "none"), load(folder))
    same(load_file(tmp_path / "ours" / "model.safetensors"), stored)


def test_shards_are_one_model(tmp_path):
    stored = tensors(QWEN)
    same(load(write_shards(tmp_path / "shards", QWEN, stored)), load(write(tmp_path / "whole", QWEN, stored)))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_widened_exactly(tmp_path, dtype):
    half = {name: tensor.astype(dtype) for name, tensor in tensors(QWEN).items()}
    wide = {name: tensor.astype(np.float32) for name, tensor in half.items()}
    same(load(write(tmp_path / "half", QWEN, half)), load(write(tmp_path / "wide", QWEN, wide)))


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(tmp_path):
    stored = tensors(LLAMA)
    plain = load(write(tmp_path / "plain", LLAMA, stored))
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(d // 2, np.float32)
    same(load(write(tmp_path / "old", LLAMA, stored)), plain)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("halves", [write, write_shards], ids=["one file", "shards"])
def test_the_head_of_a_tied_model_is_left_out(tmp_path, capsys, halves):
    """Official small Qwen3 models hold it; a head that is another one is not read either, and that is said."""
    stored = tensors(QWEN)
    plain = load(write(tmp_path / "plain", QWEN, stored))
    same(load(halves(tmp_path / "equal", QWEN, stored | {HEAD: stored[EMBEDDING]})), plain)
    assert capsys.readouterr().out == ""
    same(load(halves(tmp_path / "other", QWEN, stored | {HEAD: stored[EMBEDDING] + 1})), plain)
    told = capsys.readouterr().out
    assert "lm_head.weight differs from the embedding and is not read" in told and told.count("\n") == 1
    head = {HEAD if name == EMBEDDING else name: tensor for name, tensor in stored.items()}
    same(load(halves(tmp_path / "head", QWEN, head)), plain)  # transformers ties the other way round then


def test_an_untied_model_without_a_head_is_refused_with_what_to_set(tmp_path):
    stored = tensors(QWEN)
    with pytest.raises(UserError, match=r"lacks tensor lm_head\.weight; .*set tie_word_embeddings to true in .*config\.json"):
        load(write(tmp_path, QWEN | {"tie_word_embeddings": False}, stored))


@pytest.mark.parametrize("stated", [QWEN, LLAMA], ids=["tied", "untied"])
def test_a_checkpoint_of_the_decoder_alone_has_no_prefix(tmp_path, stated):
    """As `Qwen2Model.save_pretrained` writes it."""
    stored = tensors(stated)
    bare = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    same(load(write_shards(tmp_path / "bare", stated, bare)), load(write(tmp_path / "plain", stated, stored)))


def test_a_tensor_in_two_shards_must_be_the_same(tmp_path):
    stored = tensors(QWEN)
    plain = load(write(tmp_path / "plain", QWEN, stored))
    folder = write_shards(tmp_path / "shards", QWEN, stored)
    second = load_file(folder / "b.safetensors")
    save_file(second | {EMBEDDING: stored[EMBEDDING]}, folder / "b.safetensors")
    same(load(folder), plain)
    changed = stored[EMBEDDING].copy()
    changed[-1, -1] += 1
    save_file(second | {EMBEDDING: changed}, folder / "b.safetensors")
    with pytest.raises(UserError, match=rf"b\.safetensors and .*a\.safetensors differ in tensor {EMBEDDING}"):
        load(folder)


def test_transformers_and_we_read_each_others_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Config(
        vocab_size=V, hidden_size=32, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=K, rope_theta=500.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    config = hf_config.read_config(tmp_path / "theirs", "bfloat16", "none")
    assert config == DecoderConfig(V, 32, L, H, K, 8, F, rope_theta=500.0, norm_eps=1e-5, dtype="bfloat16")
    weights.save_params(tmp_path / "ours", config, fresh(config, jax.random.key(0)))
    ours = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "use_sliding_window"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_parameters["rope_theta"] == 500.0


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"model_type": "gemma3"}, "model_type='gemma3'"),
        ({"model_type": None}, "model_type=None"),
        ({"use_sliding_window": True, "layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 1}, "sliding_window=0"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "four"}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "mscale": 1.0}}, "rope_scaling"),
        ({"rope_scaling": [4.0]}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "factor must be a positive number"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_scaling"),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor must be below"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "disagree"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 32}, "=32 beside it says something else"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"is_causal": False}, "is_causal=False"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false"),
        ({"use_sliding_window": 1}, "use_sliding_window=1 must be true or false"),
        ({"model_type": "llama", "mlp_bias": "yes"}, "mlp_bias='yes' must be true or false"),
        ({"head_dim": 7}, "give no even head_dim"),
        ({"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5}, "give no even head_dim"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"rope_theta": "large"}, "rope_theta='large'"),
    ],
)
def test_another_architecture_is_refused_by_file_and_key(tmp_path, change, culprit):
    (tmp_path / "config.json").write_text(json.dumps(QWEN | change))
    with pytest.raises(UserError, match="config.json: .*" + culprit):
        hf_config.read_config(tmp_path, "float32", "none")


@pytest.mark.parametrize(
    ("change", "theta", "scaling"),
    [
        ({}, 500.0, {}),
        ({"rope_theta": None}, 10_000.0, {}),  # what transformers takes where it is not given
        ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 7.0}}, 7.0, {}),
        ({"rope_scaling": YARN}, 500.0, YARN),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 500.0, YARN | {"original_max_position_embeddings": 640}),
        ({"rope_parameters": YARN | {"rope_theta": 7.0}}, 7.0, YARN),
        ({"rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 500.0}}, 500.0, YARN),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 160}, 500.0, YARN),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 1.0}}, 500.0,
         {"rope_type": "linear", "factor": 2}),
        ({"rope_parameters": LLAMA3_ROPE}, 500.0, LLAMA3_ROPE),
    ],
)  # fmt: skip
def test_rotary_positions_in_either_spelling(tmp_path, change, theta, scaling):
    """As transformers reads the same file; its own reading is the reference where it reads the file at all."""
    stated = {key: value for key, value in (QWEN | {"hidden_size": H * d} | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    config = hf_config.read_config(tmp_path, "float32", "none")
    assert (config.rope_theta, dict(config.rope_scaling)) == (theta, scaling)
    if not ({"rope_scaling", "rope_parameters"} <= change.keys()):
        theirs = pytest.importorskip("transformers").AutoConfig.from_pretrained(tmp_path).rope_parameters
        kept = {key: value for key, value in theirs.items() if key not in ("type", "partial_rotary_factor")}
        assert kept == {"rope_type": "default", "rope_theta": theta} | scaling


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"use_sliding_window": True, "sliding_window": None}, ()),
        ({"use_sliding_window": False, "sliding_window": 16, "layer_types": ["full_attention"] * L}, ()),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": L}, ()),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, (0, 16)),
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}, (16, 0)),
    ],
)
def test_windows_are_those_that_transformers_has(tmp_path, change, windows):
    stated = QWEN | {"hidden_size": H * d} | change
    (tmp_path / "config.json").write_text(json.dumps(stated))
    config = hf_config.read_config(tmp_path, "float32", "none")
    assert config.windows == windows
    (tmp_path / "again").mkdir()
    hf_config.write_config(tmp_path / "again", config)
    for folder in (tmp_path, tmp_path / "again"):
        theirs = pytest.importorskip("transformers").AutoConfig.from_pretrained(folder)
        sliding = [theirs.sliding_window or 0 if kind == "sliding_attention" else 0 for kind in theirs.layer_types]
        assert tuple(sliding) == (windows or (0,) * L)


@pytest.mark.parametrize("text", [None, "", "[1]", '{"model_type": "qwen2"'])
def test_a_missing_or_damaged_config_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        hf_config.read_config(tmp_path, "float32", "none")


@pytest.mark.parametrize(
    ("file", "advice"), [("model-q8_0.gguf", r"such as .*model-q8_0\.gguf"), ("adapter_config.json", "merge them into")]
)
def test_a_folder_of_another_kind_is_refused_with_what_to_name(tmp_path, file, advice):
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=f"is not a Hugging Face model folder; .*{advice}"):
        hf_config.read_config(tmp_path, "float32", "none")


NAME = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda t: t.pop(NAME), f"lacks tensor {NAME}"),
        (lambda t: t.update({NAME: t[NAME].T.copy()}), rf"{NAME} has shape \[32, 24\], .* requires \[24, 32\]"),
        (lambda t: t.update({NAME: t[NAME].astype(np.int8)}), f"{NAME} is stored as I8"),
        (lambda t: t.update({NAME.replace("1", "2", 1): t[NAME]}), r"no place for tensor model.layers.2"),
    ],
    ids=["missing", "shape", "type", "extra"],
)
def test_a_wrong_tensor_is_refused_by_file_and_name(tmp_path, change, culprit):
    stored = tensors(QWEN)
    change(stored)
    with pytest.raises(UserError, match=r"model\.safetensors.* " + culprit):
        load(write(tmp_path, QWEN, stored))


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = write(tmp_path, QWEN, tensors(QWEN)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load(tmp_path)


def _index_without(folder, name):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop(name)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "culprit"),
    [
        (lambda f: (f / "b.safetensors").unlink(), r"b\.safetensors cannot be read"),
        (lambda f: save_file({"x": np.ones(1)}, f / "b.safetensors"), r"b\.safetensors lacks tensor model\.layers\.1"),
        (lambda f: _index_without(f, NAME), rf"index\.json lacks tensor {NAME}"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), r"index\.json cannot be read"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), r"model\.safetensors is missing"),
    ],
    ids=["no shard", "empty shard", "index too short", "no map", "no index"],
)
def test_damaged_shards_are_refused(tmp_path, damage, culprit):
    damage(write_shards(tmp_path, QWEN, tensors(QWEN)))
    with pytest.raises(UserError, match=culprit):
        load(tmp_path)


def test_a_local_folder_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_a_hub_name_is_fetched_without_pickles(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **rest: asked.update(rest, name=name) or tmp_path)
    assert hub.resolve("Qwen/Qwen2.5-3B-Instruct") == tmp_path
    assert asked["name"] == "Qwen/Qwen2.5-3B-Instruct"
    offered = ["config.json", "model-00001-of-00002.safetensors", "merges.txt", "pytorch_model.bin", "model.pth", "x.pkl"]
    taken = huggingface_hub.utils.filter_repo_objects(offered, allow_patterns=asked["allow_patterns"])
    assert list(taken) == offered[:3]


@pytest.mark.parametrize("path", ["nobody/has-this-model", "/no/such/folder", "~/no/such/folder"])
def test_an_unknown_model_is_refused_in_one_sentence(tmp_path, monkeypatch, path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=path) as refusal:
        hub.resolve(path)
    assert "give a local folder in config.model.path or download" in str(refusal.value)
    assert "\n" not in str(refusal.value) and ". " not in str(refusal.value)


def test_a_run_takes_tokenizer_model_and_weights_from_the_folder(tmp_path):
    from epo_jax.models.tokenizer import train_tokenizer
    from epo_jax.runs.policies import load_pretrained
    from epo_jax.settings.config import base_config

    trained = train_tokenizer(["take apple 1 from cabinet 3"], 300)
    template = (
        "{% for m in messages %}<|agent|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|agent|>assistant {% endif %}"
    )
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": template}
    vocabulary = trained.vocab_size + 5  # rows that no token uses, as in Qwen2.5
    decoder = DecoderConfig(vocabulary, D, L, H, K, d, F, dtype="bfloat16", remat="full")
    params = fresh(decoder, jax.random.key(0))
    weights.save_params(tmp_path, decoder, params)
    trained.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    config = base_config()
    config.model.path = str(tmp_path)
    tokenizer, model, loaded = load_pretrained(config)
    assert model == dataclasses.replace(decoder, unused_ids=((vocabulary - 5, vocabulary),))
    same(loaded, params)
    text = tokenizer.backend.decode(tokenizer.first("apple 1"), skip_special_tokens=False)
    assert text == "<|agent|>user apple 1<|end|><|agent|>assistant "
    assert tokenizer.backend.id_to_token(tokenizer.stop_id) == "<|end|>"
    # A vocabulary that the tokenizer outgrows would index past the embedding.
    decoder = DecoderConfig(trained.vocab_size - 1, D, L, H, K, d, F)
    weights.save_params(tmp_path, decoder, fresh(decoder, jax.random.key(0)))
    with pytest.raises(UserError, match="vocab_size"):
        load_pretrained(config)


def test_an_error_of_the_machine_is_not_told_as_a_damaged_download(tmp_path, monkeypatch):
    def failing(*_, **__):
        raise OSError(24, "Too many open files")

    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(weights, "safe_open", failing)
    with pytest.raises(UserError, match=r"Too many open files\); raise the limit on open files") as refusal:
        weights._weight_map(tmp_path)
    assert "download" not in str(refusal.value)
