"""Layout, writing and reading of the key/value cache of a layer.

Keys are [slot, head, width, position] and values [slot, head, position, width], the orders in which a decode step reads them;
on a CPU this is two to five times faster than one common order. With `int8` a vector is stored as 8-bit integers and one scale,
its largest magnitude over 127, in half the memory of bfloat16.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# (keys, values), or with int8 (keys, values, scales of the keys, scales of the values)
LayerCache = tuple[Array, ...]

# The logical axes (epo_jax/parallel/mesh.py) of these arrays.
AXES = (
    ("slots", "kv_heads", "head_dim", "positions"),
    ("slots", "kv_heads", "positions", "head_dim"),
    ("slots", "kv_heads", "positions"),
    ("slots", "kv_heads", "positions"),
)


def init_layer(slots: int, heads: int, width: int, capacity: int, dtype: str) -> LayerCache:
    """An empty cache of one layer with `capacity` positions per slot."""
    arrays = jnp.zeros((slots, heads, width, capacity), dtype), jnp.zeros((slots, heads, capacity, width), dtype)
    if dtype == "int8":
        arrays += tuple(jnp.zeros((slots, heads, capacity), jnp.float32) for _ in range(2))
    return arrays


@jax.named_scope("kv_cache")
def append(
    layer: LayerCache, rows: Int[Array, "R 1"], columns: Int[Array, "R T"], k: Float[Array, "R T K d"], v: Float[Array, "R T K d"]
) -> LayerCache:
    """Writes new keys and values at (row, column).

    An index past the end is dropped.
    """
    keys, values, *scales = layer
    if scales:
        (k, k_scale), (v, v_scale) = _quantised(k), _quantised(v)
        scales = [s.at[rows, :, columns].set(new, mode="drop") for s, new in zip(scales, (k_scale, v_scale), strict=True)]
    keys = keys.at[rows, :, :, columns].set(k.astype(keys.dtype), mode="drop")
    values = values.at[rows, :, columns].set(v.astype(values.dtype), mode="drop")
    return keys, values, *scales


@jax.named_scope("kv_cache")
def read(
    layer: LayerCache, slots: Int[Array, " R"] | None, dtype: jnp.dtype
) -> tuple[Float[Array, "R K d C"], Float[Array, "R K C d"]]:
    """Keys and values of the given slots (None: all) in `dtype`."""
    keys, values, *scales = layer if slots is None else (a.at[slots].get(mode="clip") for a in layer)
    keys, values = keys.astype(dtype), values.astype(dtype)
    if scales:
        return keys * scales[0][:, :, None].astype(dtype), values * scales[1][..., None].astype(dtype)
    return keys, values


def take(layer: LayerCache, slots: Int[Array, " R"], capacity: int) -> LayerCache:
    """A cache of the given slots, each with room for `capacity` positions."""

    def fit(x, axis):
        x = x[slots]
        missing = [(0, max(capacity - x.shape[a], 0) if a == axis else 0) for a in range(x.ndim)]
        return jax.lax.slice_in_dim(jnp.pad(x, missing), 0, capacity, axis=axis)

    return tuple(fit(x, axes.index("positions")) for x, axes in zip(layer, AXES, strict=False))


def copy(layer: LayerCache, source: Int[Array, " R"], target: Int[Array, " R"], columns: int) -> LayerCache:
    """Copies the first `columns` positions of slots `source` to `target`.

    A target past the last slot is dropped.
    """

    def one(x, axis):
        part = (*[slice(None)] * (axis - 1), slice(columns))
        return x.at[(target, *part)].set(x.at[(source, *part)].get(mode="clip"), mode="drop")

    return tuple(one(x, axes.index("positions")) for x, axes in zip(layer, AXES, strict=False))


def _quantised(x: Float[Array, "R T K d"]) -> tuple[Int[Array, "R T K d"], Float[Array, "R T K"]]:
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis=-1), 1e-30) / 127.0
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale
