"""The optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from epo_jax.optim import OptimConfig, make_optimizer


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
