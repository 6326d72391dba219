"""Adapters: what they add, what stays frozen, many of them over one base, and out again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.models import lora, weights
from epo_jax.models.decoder import PROJECTIONS, DecoderConfig, Lora, bind, init_params
from epo_jax.models.generate import extend, init_cache
from epo_jax.settings.table import LORA_TARGETS

BASE = DecoderConfig(31, 24, 2, 4, 2, 8, 40, tie_embeddings=False)
CONFIG = dataclasses.replace(BASE, lora=Lora(3, 6.0, ("q_proj", "v_proj", "o_proj", "down_proj")))
TOKENS = jax.random.randint(jax.random.key(9), (2, 12), 0, 31)


def noise(tree, seed, scale):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def base():
    return noise(jax.jit(init_params, static_argnums=0)(BASE, jax.random.key(0)), 1, 0.1)


@pytest.fixture(scope="module")
def adapters():
    return noise(lora.init_adapters(CONFIG, jax.random.key(2)), 3, 0.2)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params):
    module = bind(config, params)
    hidden = module(TOKENS, jnp.tile(jnp.arange(12)[None], (2, 1)), jnp.ones((2, 12), jnp.int32))
    return hidden @ module.output_embedding().T


def test_new_adapters_change_nothing(base):
    new = lora.init_adapters(CONFIG, jax.random.key(2))
    assert set(new) == {"layers"} and {x.shape for x in jax.tree.leaves(new)} == {
        (2, 24, 3), (2, 3, 32), (2, 3, 16), (2, 32, 3), (2, 3, 24), (2, 40, 3),
    }  # fmt: skip
    np.testing.assert_array_equal(forward(CONFIG, lora.join(base, new)), forward(BASE, base))


def test_merged_weights_compute_the_same(base, adapters):
    params = lora.join(base, adapters)
    merged = lora.merge(CONFIG, params)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    written_out = base["layers"]["q_proj"][1] + 2.0 * (
        adapters["layers"]["q_proj_lora_a"][1] @ adapters["layers"]["q_proj_lora_b"][1]
    )
    np.testing.assert_allclose(merged["layers"]["q_proj"][1], written_out, rtol=1e-5, atol=1e-6)
    want = forward(CONFIG, params)
    np.testing.assert_allclose(forward(BASE, merged), want, rtol=1e-4, atol=1e-4)
    assert jnp.abs(want - forward(BASE, base)).max() > 0.1


def test_joining_copies_nothing_and_splitting_undoes_it(base, adapters):
    params = lora.join(base, adapters)
    assert params["layers"]["up_proj"] is base["layers"]["up_proj"] and params["embedding"] is base["embedding"]
    for found, wanted in zip(lora.split(params), (base, adapters), strict=True):
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        assert all(a is b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    assert lora.join(base, {}) == base | {"layers": base["layers"]} and lora.join({}, base)["embedding"] is base["embedding"]


def test_the_sampler_sees_the_adapters(base, adapters):
    params = lora.join(base, adapters)
    cache = init_cache(CONFIG, slots=2, capacity=12)
    cache = extend(CONFIG, params, cache, TOKENS, jnp.full(2, 12, jnp.int32), jnp.array([True, True]))
    logits = cache.hidden @ params["lm_head"].T
    np.testing.assert_allclose(logits, forward(CONFIG, params)[:, -1], rtol=1e-4, atol=1e-4)


def test_a_stack_of_adapters_shares_one_base(base):
    stack = jax.vmap(lambda key: lora.init_adapters(CONFIG, key))(jax.random.split(jax.random.key(4), 3))
    stack = noise(stack, 5, 0.2)
    members = jax.jit(jax.vmap(lambda base, adapters: forward(CONFIG, lora.join(base, adapters)), in_axes=(None, 0)))
    got = members(base, stack)
    for m in range(3):
        want = forward(CONFIG, lora.join(base, jax.tree.map(lambda x, m=m: x[m], stack)))
        np.testing.assert_allclose(got[m], want, rtol=1e-4, atol=1e-4)


def test_more_members_need_no_more_copies_of_the_base():
    """The memory of a gradient grows by the members' activations only."""
    big = dataclasses.replace(CONFIG, d_model=256, d_ff=1024, num_layers=9, remat="full")
    base, adapters = lora.split(jax.eval_shape(lambda: init_params(big, jax.random.key(0))))

    def loss(adapters, base):
        return jnp.square(jax.vmap(lambda a: forward(big, lora.join(base, a)))(adapters)).sum()

    def temporaries(members: int) -> int:
        stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((members, *x.shape), x.dtype), adapters)
        compiled = jax.jit(jax.grad(loss)).lower(stack, base).compile({"xla_backend_optimization_level": 0})
        return compiled.memory_analysis().temp_size_in_bytes

    size = sum(4 * x.size for x in jax.tree.leaves(base))
    assert temporaries(6) - temporaries(2) < 0.5 * size


def test_adapters_in_peft_load_and_agree(base, adapters, tmp_path):
    torch = pytest.importorskip("torch", reason="PEFT, which only this check needs, runs on torch")
    peft = pytest.importorskip("peft", reason="PEFT, which only this check needs, is not installed")
    import transformers

    weights.save_params(tmp_path / "base", BASE, base)
    lora.save_adapters(tmp_path / "adapters", CONFIG, adapters, str(tmp_path / "base"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapters").eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(np.array(TOKENS))).logits.numpy()
    np.testing.assert_allclose(forward(CONFIG, lora.join(base, adapters)), theirs, rtol=1e-4, atol=1e-4)


def test_every_projection_can_be_a_target():
    assert LORA_TARGETS == tuple(PROJECTIONS)
    every = dataclasses.replace(BASE, lora=Lora(2, 4.0))
    found = lora.init_adapters(every, jax.random.key(0))["layers"]
    assert {key.rpartition("_lora_")[0] for key in found} == set(PROJECTIONS)
