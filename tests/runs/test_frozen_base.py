"""The digest by which another base is noticed."""

import jax
import jax.numpy as jnp
import numpy as np

from epo_jax.models.decoder import DecoderConfig, init_params, param_axes
from epo_jax.parallel import mesh
from epo_jax.runs import frozen_base

MODEL = DecoderConfig(40, 16, 1, 8, 4, 4, 32)


def test_a_digest_depends_on_every_bit_and_place_but_on_no_device():
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    first = frozen_base.digest(params)
    on = mesh.make_mesh(2, 2, 2)
    assert frozen_base.digest(jax.device_put(params, mesh.shardings(on, params, param_axes(MODEL)))) == first
    table = np.asarray(params["embedding"])
    nudged, swapped = table.copy(), table[::-1].copy()
    nudged[3, 5] = np.nextafter(nudged[3, 5], np.inf, dtype=np.float32)
    others = [params | {"embedding": jnp.asarray(each)} for each in (nudged, swapped, -table)]
    others.append(params | {"final_norm": -params["final_norm"]})
    assert len({first, *map(frozen_base.digest, others)}) == 5
