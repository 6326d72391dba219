"""The decoder against transformers, and every other way to compute the same logits against the plain forward pass."""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.models import hf_config, weights
from epo_jax.models.decoder import bind, init_params
from epo_jax.models.generate import extend, init_cache

_spec = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

CASES = pytest.mark.parametrize("case", reference.CASES)
T = reference.TOKENS.shape[1]


def names_and_shapes(config):
    """What a checkpoint of `config` holds, by our account; transformers' own account is checked where torch is installed."""
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    layers = shapes.pop("layers")
    found = {weights.tensor_names(key)[0]: shape.shape for key, shape in shapes.items()}
    for key, shape in layers.items():
        found |= dict.fromkeys(weights.tensor_names(key, config.num_layers), shape.shape[:0:-1])
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Case -> (config, params), loaded from a folder as a user would."""
    found = {}
    for case in reference.CASES:
        folder = tmp_path_factory.mktemp(case.replace(".", "_"))
        reference.write(folder, case, {})
        config = hf_config.read_config(folder, "float32", "none")
        reference.write(folder, case, names_and_shapes(config))
        found[case] = config, weights.load_params(folder, config)
    return found


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, positions, segment_ids):
    module = bind(config, params)
    return module(tokens, positions, segment_ids) @ module.output_embedding().T


def plain(config, params):
    tokens = jnp.asarray(reference.TOKENS, jnp.int32)
    return forward(config, params, tokens, jnp.arange(T)[None], jnp.ones((1, T), jnp.int32))


@CASES
def test_logits_equal_those_that_transformers_computed(checkpoints, case):
    ours, theirs = plain(*checkpoints[case]), np.load(reference.FILE)[case]
    assert 30 < np.abs(theirs).max() < 80
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@CASES
def test_padding_packing_and_cache_leave_the_logits_alone(checkpoints, case):
    config, params = checkpoints[case]
    want = plain(config, params)[0]
    tokens = np.zeros((3, T + 12), np.int32)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, start in ((0, 0), (1, 12)):  # padded right, padded left
        tokens[row, start : start + T] = reference.TOKENS
        positions[row, start : start + T] = np.arange(T)
        segments[row, start : start + T] = 1
    tokens[2, :12], positions[2, :12], segments[2, :12] = 7, np.arange(12), 1  # behind another segment
    tokens[2, 12:], positions[2, 12:], segments[2, 12:] = reference.TOKENS[0], np.arange(T), 2
    got = forward(config, params, tokens, positions, segments)
    for row, start in ((0, 0), (1, 12), (2, 12)):
        np.testing.assert_allclose(got[row, start : start + T], want, atol=1e-4, rtol=0)

    cache = init_cache(config, slots=2, capacity=T + 3)
    head = bind(config, params).output_embedding()
    done, fresh = 0, jnp.array([True, True])
    for count in (13, 1, 1, 20, 13):
        piece = np.zeros((2, 20), np.int32)
        piece[:, :count] = reference.TOKENS[:, done : done + count]
        cache = extend(config, params, cache, piece, jnp.full(2, count, jnp.int32), fresh)
        done, fresh = done + count, jnp.zeros(2, bool)
        np.testing.assert_allclose(cache.hidden[1] @ head.T, want[done - 1], atol=1e-4, rtol=0)


def test_bfloat16_stays_near_float32(checkpoints):
    config, params = checkpoints["qwen3"]
    want = plain(config, params)
    got = plain(dataclasses.replace(config, dtype="bfloat16"), params)
    assert got.dtype == jnp.float32 and 0 < np.abs(got - want).mean() < 0.05 * np.abs(want).max()


@CASES
def test_the_stored_logits_are_those_of_the_installed_transformers(checkpoints, tmp_path, case):
    torch = pytest.importorskip("torch", reason="torch, which only this check of the stored reference needs, is not installed")
    transformers = pytest.importorskip("transformers")
    theirs = reference.model(case)
    np.testing.assert_allclose(reference.logits(theirs), np.load(reference.FILE)[case], atol=2e-4, rtol=0)
    config, params = checkpoints[case]
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    assert {n: tuple(t.shape) for n, t in theirs.state_dict().items() if n not in tied} == names_and_shapes(config)
    # And back: what we write is the same model to them, bit by bit.
    weights.save_params(tmp_path, config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    np.testing.assert_array_equal(reference.logits(again), reference.logits(theirs))
