"""The device mesh of a run and the sharding of its arrays.

The mesh has three axes, any of which may be 1:

    data     rows of a batch; parameters are replicated
    fsdp     rows of a batch too; every parameter and its optimizer state are sharded, and a layer's weights are all-gathered
             where the layer is computed
    tensor   heads, hidden units and vocabulary; between layers, tokens

A parameter, a batch or a cache names the logical axes of its arrays where it is defined ("vocab", "rows"). `RULES` maps
logical axes to mesh axes: it is the only table to change for another layout. Code that runs on the devices names the logical
axes of what it computes (`constrain`, `at_use`, `locally`); without a mesh, or on a mesh of one device, these do nothing.
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from epo_jax.common.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Mesh axes over which the rows of a batch and the slots of a cache are sharded.
ROWS = ("data", "fsdp")

# The logical axes of an array, in order; None is a whole axis without a name.
Axes = tuple[str | None, ...]

# Logical axis -> mesh axes over which it is sharded.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",  # the side of a matrix that is as wide as the residual stream
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "rank": None,  # adapters are sharded like the weight next to them, never along their rank
    "hidden": None,  # vectors as wide as the residual stream, and hidden states
    "head_dim": None,
    # batches
    "mini_batches": None,
    "rows": ROWS,
    "row_tokens": None,
    "row_policy_tokens": None,
    "trajectories": None,
    "turns": None,
    # caches
    "slots": ROWS,
    "positions": None,
    # activations; the rows of a batch are flattened to tokens
    "tokens": ROWS,
    "residual_tokens": AXES,  # of the residual stream, between the blocks' matrix products
}

_GPU = "/dev/nvidia0"  # what the driver makes for the first GPU


def make_mesh(data: int = 0, fsdp: int = 0, tensor: int = 0, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of these sizes over `devices` (all by default).

    A size below 1 is automatic. `tensor` is then 1. On TPUs the remaining devices go to `fsdp`; on GPUs as many of them go to
    `fsdp` as one process has, where links are fast, and the rest to `data`. A CPU counts as one device per process, in `data`:
    only tests simulate more, and they name the sizes. Every process contributes the same number of devices.

    Raises:
        UserError: there are too few devices, or the processes cannot contribute equal numbers.
    """
    devices = list(jax.devices() if devices is None else devices)
    processes = sorted({d.process_index for d in devices})
    by_process = [[d for d in devices if d.process_index == process] for process in processes]
    if devices[0].platform == "cpu" and (data < 1 or fsdp < 1):
        limit = max(data, 1) * max(fsdp, 1) * max(tensor, 1) // len(processes)
        by_process = [of_process[: max(1, limit)] for of_process in by_process]
    available = sum(map(len, by_process))
    shape = _shape((data, fsdp, tensor), available, len(by_process[0]), devices[0].platform)
    size = math.prod(shape)
    if size > available or size % len(processes) or size < 1:
        sizes = ", ".join(f"config.mesh.{axis}={n}" for axis, n in zip(AXES, (data, fsdp, tensor), strict=True))
        raise UserError(
            f"{sizes} cannot be made of {available} {devices[0].platform} devices in {len(processes)} processes; "
            "choose sizes whose product is their number, or 0 for automatic ones."
        )
    chosen = [d for of_process in by_process for d in of_process[: size // len(processes)]]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=chosen)


def _shape(sizes: tuple[int, int, int], available: int, per_process: int, platform: str) -> tuple[int, int, int]:
    data, fsdp, tensor = sizes
    tensor = max(tensor, 1)
    if fsdp < 1:
        room = available // tensor // max(data, 1)
        fsdp = {"cpu": 1, "gpu": max(1, min(room, per_process // tensor))}.get(platform, room)
    if data < 1:
        data = available // tensor // max(fsdp, 1)
    return data, fsdp, tensor


def check(mesh: Mesh, model, row_tokens: int) -> None:
    """Raises UserError unless the mesh shards a `DecoderConfig` equally, in whole heads."""
    per_process = mesh.size // processes(mesh)
    for axis, of, length in (
        ("tensor", "devices of each process, which samples with its own", per_process),
        ("tensor", "key/value heads of the model", model.num_kv_heads),
        ("tensor", "hidden units of the model", model.d_ff),
        ("tensor", "tokens of config.train.rows_tokens", row_tokens),
        ("fsdp", "columns of the model's width", model.d_model),
    ):
        if length % mesh.shape[axis]:
            raise UserError(f"config.mesh.{axis}={mesh.shape[axis]} must divide the {length} {of}; choose a divisor.")


def row_shards(mesh: Mesh) -> int:
    """Number of shards of a batch's rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def own_rows(mesh: Mesh, rows: int) -> set[int]:
    """Which rows of a batch of `rows` are on devices of this process."""
    slices = NamedSharding(mesh, spec("rows")).addressable_devices_indices_map((rows,)).values()
    return {row for (shard,) in slices for row in range(rows)[shard]}


def processes(mesh: Mesh) -> int:
    """Number of processes whose devices are in the mesh."""
    return len({device.process_index for device in mesh.devices.flat})


def devices_in_use() -> str:
    """A line that describes the devices JAX has found, and a warning if there is a GPU that this JAX cannot use.

    Raises:
        UserError: there is no device of the platform that JAX_PLATFORMS names.
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise UserError(
            f"JAX_PLATFORMS={platforms!r}: JAX finds no such device ({reason}); install JAX for it (pip install 'jax[cuda12]' or "
            "'jax[tpu]'), or unset the variable."
        ) from None
    line = f"device: {describe(devices)}"
    if devices[0].platform == "cpu" and "JAX_PLATFORMS" not in os.environ and os.path.exists(_GPU):
        line += "\nwarning: this machine has an NVIDIA GPU, which this JAX cannot use; pip install 'jax[cuda12]'"
    return line


def describe(devices: Sequence[jax.Device]) -> str:
    """For example "1 x cpu, 2 cores" or "8 x TPU v5 lite"."""
    kind, platform = devices[0].device_kind, devices[0].platform
    cores = f", {os.cpu_count()} cores" if platform == "cpu" else ""
    return f"{len(devices)} x {kind}{cores}" + (f" ({platform})" if platform not in kind.lower() else "")


def spec(*axes: str | None, without: str | None = None) -> P:
    """The mesh axes for these logical axes, `without` one mesh axis.

    Raises:
        ValueError: `RULES` has no such logical axis.
    """

    def of(name: str | None) -> str | tuple[str, ...] | None:
        if name is None:
            return None
        if name not in RULES:
            raise ValueError(f"RULES in epo_jax/parallel/mesh.py has no logical axis {name!r}; add it.")
        return RULES[name]

    return _without(P(*map(of, axes)), without)


def _without(spec: P, axis: str | None) -> P:
    def remaining(axes):
        if isinstance(axes, tuple):
            return tuple(a for a in axes if a != axis) or None
        return None if axes == axis else axes

    return P(*map(remaining, spec))


def shardings(mesh: Mesh, tree: PyTree, axes: PyTree[Axes], without: str | None = None) -> PyTree[NamedSharding]:
    """The sharding of each array of `tree` by its logical axes.

    The arrays may be abstract.

    Args:
        axes: a pytree like `tree` whose leaves are tuples, one name for each axis of the array.
        without: a mesh axis over which all arrays are replicated instead.

    Raises:
        UserError: a mesh axis does not divide the array's axis that it shards.
        ValueError: an array has no logical axes, or not as many as dimensions, or one that `RULES` does not name.
    """

    def of(path, leaf, names: Axes) -> NamedSharding:
        where = f"{jax.tree_util.keystr(path)} {list(leaf.shape)}"
        if len(names) != len(leaf.shape):
            raise ValueError(f"{where} has the logical axes {names}; name one for each dimension.")
        placed = spec(*names, without=without)
        for length, sharded_over in zip(leaf.shape, placed, strict=True):
            for axis in (sharded_over,) if isinstance(sharded_over, str) else sharded_over or ():
                if length % mesh.shape[axis]:
                    raise UserError(
                        f"config.mesh.{axis}={mesh.shape[axis]} does not divide the {length} of {where}; choose a divisor."
                    )
        return NamedSharding(mesh, placed)

    return jax.tree_util.tree_map_with_path(of, tree, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of which every device has a copy."""
    return NamedSharding(mesh, P())


def abstract(tree: PyTree, shardings: PyTree[NamedSharding]) -> PyTree[jax.ShapeDtypeStruct]:
    """`tree`, which may be abstract, as shapes, types and shardings; computes nothing."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)


def place(tree: PyTree, shardings: PyTree[NamedSharding]) -> PyTree:
    """Copies arrays from the host to the mesh.

    Each process copies the shards of its own devices; what several processes copy must be equal in them.
    """

    def of(x, sharding: NamedSharding) -> Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    return jax.tree.map(of, tree, shardings)


def on_this_host(tree: PyTree) -> PyTree:
    """Arrays on a mesh, all-gathered over "fsdp".

    On a mesh of several processes the result is on this process's devices alone, which then compute without the others. All
    processes must call this together.
    """
    mesh = mesh_of(tree)
    if mesh is None:
        return tree

    def gathered(onto: Mesh) -> PyTree:
        return jax.device_put(tree, jax.tree.map(lambda x: NamedSharding(onto, _without(x.sharding.spec, "fsdp")), tree))

    if processes(mesh) == 1:
        return gathered(mesh)
    devices = sorted(mesh.devices.flat, key=lambda device: device.process_index)
    local = [device for device in devices if device.process_index == jax.process_index()]
    # Each process has all shards along "tensor", once or several times.
    everywhere, here = (
        Mesh(np.array(some).reshape(-1, 1, mesh.shape["tensor"]), AXES, axis_types=(AxisType.Auto,) * 3)
        for some in (devices, local)
    )

    def of(x) -> Array:
        shards = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(here, x.sharding.spec), shards)

    return jax.tree.map(of, gathered(everywhere))


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh on which arrays are placed; None for one device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if isinstance(mesh, Mesh) and mesh.size > 1 and mesh.axis_names == AXES:
            return mesh
    return None


def inside(mesh: Mesh | None):
    """Context in which functions are traced for `mesh`.

    `constrain`, `at_use` and `locally` take effect in it.
    """
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _current() -> jax.sharding.AbstractMesh | None:
    # A sweep's members have a mesh with another axis, each of whose devices computes alone.
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.size == 1 or mesh.axis_names != AXES else mesh


def platform() -> str:
    """The platform for which a function is being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.platform


def divides(axis: str, length: int) -> bool:
    """Whether the current mesh can shard a logical axis of this length.

    False without a mesh.
    """
    return _current() is not None and _divides(spec(axis), (length,))


def _divides(placed: P, shape: tuple[int, ...]) -> bool:
    sizes = _current().shape
    names = [(axes,) if isinstance(axes, str) else axes or () for axes in placed]
    return all(length % math.prod(sizes[name] for name in of) == 0 for of, length in zip(names, shape, strict=False))


def constrain(x: Array, *axes: str | None) -> Array:
    """Shards `x` by its logical axes if the mesh divides them.

    Axes that are not named are not sharded.
    """
    return _constrain(x, spec(*axes))


def at_use(weight: Array, *axes: str | None) -> Array:
    """A weight with these logical axes, all-gathered over `fsdp`.

    Its gradient is reduce-scattered over `fsdp`.
    """
    return _constrain(weight, spec(*axes, without="fsdp"))


def _constrain(x: Array, placed: P) -> Array:
    if _current() is None or not _divides(placed, x.shape):
        return x
    return jax.lax.with_sharding_constraint(x, placed)


def as_stored(tree: PyTree, axes: PyTree[Axes]) -> PyTree:
    """Arrays sharded as `shardings` shards them."""
    if _current() is None:
        return tree
    return jax.tree.map(lambda x, names: jax.lax.with_sharding_constraint(x, spec(*names)), tree, axes)


def locally(function: Callable, in_axes: tuple[Axes, ...], out_axes: Axes, mesh_axes: tuple[str, ...] = AXES) -> Callable:
    """Calls `function` on every device with the device's own shards.

    Args:
        in_axes, out_axes: the logical axes of the arguments and of the results.
        mesh_axes: the shards are those along these; XLA partitions the function along the others.
    """
    if _current() is None:
        return function
    in_specs = tuple(spec(*axes) for axes in in_axes)
    return jax.shard_map(function, in_specs=in_specs, out_specs=spec(*out_axes), axis_names=set(mesh_axes), check_vma=False)
