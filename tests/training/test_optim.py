"""The optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from epo_jax.training.optim import OptimConfig, make_optimizer, step_rate


def test_muon_orthogonalises_the_matrices_of_each_layer_and_leaves_the_rest_to_adam():
    shapes = {"embedding": (9, 6), "layers": {"kernel": (3, 6, 4), "bias": (3, 6)}}
    keys = iter(jax.random.split(jax.random.key(0), 3))
    gradient = jax.tree.map(lambda s: jax.random.normal(next(keys), s), shapes, is_leaf=lambda s: isinstance(s, tuple))
    params = jax.tree.map(jnp.zeros_like, gradient)

    def first_step(optimizer):
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    by_muon = first_step(make_optimizer(OptimConfig(0.01, 10, warmup_ratio=0.0, weight_decay=0.0, muon=True)))
    by_adam = first_step(optax.nadam(0.01))
    for update, of_layer in zip(by_muon["layers"]["kernel"], gradient["layers"]["kernel"], strict=True):
        u, singular, v = np.linalg.svd(of_layer, full_matrices=False)
        assert singular[0] > 2 * singular[-1]
        found = np.linalg.svd(update, compute_uv=False)
        assert found[0] < 1.8 * found[-1]
        assert -(update * (u @ v)).sum() > 0.97 * np.linalg.norm(update) * np.linalg.norm(u @ v)
        assert 0.1 < np.sqrt(np.mean(update**2)) / 0.01 < 0.3  # 0.2 of the learning rate, as Adam's tend to be
    for name in ("embedding", "bias"):
        ours, theirs = ((x if name in x else x["layers"])[name] for x in (by_muon, by_adam))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_the_norm_is_clipped_as_optax_clips_it():
    config = OptimConfig(0.1, 10, warmup_ratio=0.0, floor_ratio=1.0, clip_norm=0.5)
    ours, theirs = make_optimizer(config), optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.01))
    params = {"a": jnp.ones((3, 4)), "b": jnp.array([1.0, -2.0])}
    states = ours.init(params), theirs.init(params)
    for size in (0.01, 0.0, 3.0, 0.1):  # norms on both sides of the limit, and none
        gradient = {"a": jnp.full((3, 4), size), "b": jnp.array([-size, 2.0 * size])}
        (found, mine), (expected, other) = (o.update(gradient, s, params) for o, s in zip((ours, theirs), states, strict=True))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
        states = mine, other


def test_a_schedule_of_rl_steps_rises_in_a_line_and_falls_along_a_cosine():
    """Ten steps, two of warm-up, a floor of 0.2; the rate itself does not change it."""
    config = OptimConfig(3e-4, 10, warmup_ratio=0.2, floor_ratio=0.2, schedule="step")
    expected = [1 / 3, 2 / 3, *(0.2 + 0.8 * (1 + np.cos(np.pi * k / 8)) / 2 for k in range(9))]
    np.testing.assert_allclose([step_rate(config, jnp.int32(k)) for k in range(11)], expected, rtol=1e-6)
    for schedule in ("update", "constant"):
        assert step_rate(OptimConfig(3e-4, 10, schedule=schedule), jnp.int32(0)) == 1.0
