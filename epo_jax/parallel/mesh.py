"""The mesh of devices that a run is spread over, and where every array lies on it.

Three axes, any of which may be 1:

    data     rows of the batch; the weights are copied
    fsdp     rows of the batch too; each device keeps a slice of every weight and of its optimiser state, and the slices of a
             layer are put together where the layer is computed
    tensor   heads, hidden units and words; between layers, tokens

`RULES` places every array of `TrainState`, `TokenBatch` and the sampler's `Cache` by its name. What lies where between them
is said by the code that computes it (`constrain`, `at_use`, `locally`); without a mesh, or on a mesh of one device, these do
nothing.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from epo_jax.common.errors import UserError

AXES = ("data", "fsdp", "tensor")

# The axes that share the rows of a batch, and the slots of a lane.
ROWS = ("data", "fsdp")

# Name of an array -> the mesh axes of its own axes; the first rule that matches the whole name holds. Arrays under `layers` have
# the axis of layers in front. What is named nowhere is replicated, unless it is a parameter (`spec_of`).
RULES: tuple[tuple[str, P], ...] = (
    # parameters
    ("embedding|lm_head", P("tensor", "fsdp")),
    ("(q|k|v|gate|up)_proj", P(None, "fsdp", "tensor")),
    ("(o|down)_proj", P(None, "tensor", "fsdp")),
    ("(q|k|v|gate|up)_bias", P(None, "tensor")),
    # adapters are cut as the weight next to them, never along their rank
    ("(q|k|v|gate|up)_proj_lora_a", P(None, "fsdp", None)),
    ("(q|k|v|gate|up)_proj_lora_b", P(None, None, "tensor")),
    ("(o|down)_proj_lora_a", P(None, "tensor", None)),
    ("(o|down)_proj_lora_b", P(None, None, "fsdp")),
    ("(o|down)_bias|.*_norm|value", P()),
    # TokenBatch
    ("tokens|positions|segment_ids|index|label|policy_mask|trajectory|turn", P(None, ROWS)),
    ("reward|valid|behaviour_log_prob|behaviour_entropy", P(None, ROWS)),
    ("rows|returns|group|anchor|episode|seed", P()),
    # Cache
    ("layers", P(ROWS, "tensor")),
    ("lengths|hidden", P(ROWS)),
)


def make_mesh(data: int = 0, fsdp: int = 0, tensor: int = 0, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of these sizes over all `devices`, or as many as they ask for, the same number of every process.

    A size below 1 is automatic. `tensor` is then 1. On TPUs the rest goes to `fsdp`, on GPUs as much of it as one process
    has, where the links are fast, and what is left to `data`. A CPU is one device of each process, all in `data`: more are
    made up for tests, which name the sizes.

    Raises:
        UserError: there are not enough devices, or they cannot be shared out like this.
    """
    devices = list(jax.devices() if devices is None else devices)
    processes = sorted({d.process_index for d in devices})
    own = [[d for d in devices if d.process_index == process] for process in processes]
    if devices[0].platform == "cpu" and (data < 1 or fsdp < 1):
        limit = max(data, 1) * max(fsdp, 1) * max(tensor, 1) // len(processes)
        own = [of_process[: max(1, limit)] for of_process in own]
    available = sum(map(len, own))
    shape = _shape((data, fsdp, tensor), available, len(own[0]), devices[0].platform)
    size = math.prod(shape)
    asked = ", ".join(f"config.mesh.{axis}={n}" for axis, n in zip(AXES, (data, fsdp, tensor), strict=True))
    if size > available or size % len(processes) or size < 1:
        raise UserError(
            f"{asked} cannot be made of {available} {devices[0].platform} devices in {len(processes)} processes; "
            "choose sizes whose product is their number, or 0 for automatic ones."
        )
    chosen = [d for of_process in own for d in of_process[: size // len(processes)]]
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


def row_shards(mesh: Mesh) -> int:
    """Devices, or groups of them along `tensor`, that rows are dealt to."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rule(name: str) -> P:
    """The mesh axes along which the array of this name lies.

    Raises:
        UserError: no rule matches the name.
    """
    for pattern, spec in RULES:
        if re.fullmatch(pattern, name):
            return spec
    raise UserError(f"No rule of epo_jax/parallel/mesh.py places an array named {name!r}; add one to RULES.")


def spec_of(path: tuple) -> P:
    """The mesh axes of the array at a key path of `jax.tree_util`, by the last key that is a name.

    Parameters are entries of dicts, and so is what an optimizer keeps for each of them: optax stores moments in trees of the
    parameters' form. Any other array is the field of a tuple, replicated unless a rule names it: counts, coefficients.

    Raises:
        UserError: no rule matches a parameter.
    """
    for key in reversed(path):
        if isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, str):
            return rule(key.key)
        if isinstance(key, jax.tree_util.GetAttrKey):
            return next((spec for pattern, spec in RULES if re.fullmatch(pattern, key.name)), P())
    return rule("")


def shardings(mesh: Mesh, tree: PyTree, without: str | None = None) -> PyTree[NamedSharding]:
    """Where each array of `tree` lies; arrays may be abstract. `without` names an axis along which all are copied instead.

    Raises:
        UserError: no rule matches an array, or an axis of one cannot be shared out equally.
    """

    def of(path, leaf) -> NamedSharding:
        spec = _without(spec_of(path), without)
        for length, axes in zip(leaf.shape, spec, strict=False):
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                if length % mesh.shape[axis]:
                    raise UserError(
                        f"config.mesh.{axis}={mesh.shape[axis]} does not divide the {length} of "
                        f"{jax.tree_util.keystr(path)} {list(leaf.shape)}; choose a divisor."
                    )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of, tree)


def abstract(tree: PyTree, shardings: PyTree[NamedSharding]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes, types and places of arrays, which may be abstract themselves; nothing is computed."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings)


def place(tree: PyTree, shardings: PyTree[NamedSharding]) -> PyTree:
    """Arrays of the host, the same in every process, as arrays over the mesh; each process copies what its devices hold."""

    def of(x, sharding: NamedSharding) -> Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    return jax.tree.map(of, tree, shardings)


def on_this_host(tree: PyTree) -> PyTree:
    """Arrays that lie on a mesh, put together along "fsdp": on the same mesh, or where it spans several processes on the
    devices that it has of this one, which then work without the others. All processes must call this together."""
    mesh = mesh_of(tree)
    if mesh is None:
        return tree
    if processes(mesh) == 1:
        return jax.device_put(tree, shardings(mesh, tree, without="fsdp"))
    devices = sorted(mesh.devices.flat, key=lambda device: device.process_index)
    own = [device for device in devices if device.process_index == jax.process_index()]
    # The parts along "tensor" in one process, and a copy in each.
    everywhere, here = (
        Mesh(np.array(some).reshape(-1, 1, mesh.shape["tensor"]), AXES, axis_types=(AxisType.Auto,) * 3)
        for some in (devices, own)
    )
    copies = jax.device_put(tree, shardings(everywhere, tree, without="fsdp"))

    def of(x: Array) -> Array:
        parts = [part.data for part in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(here, x.sharding.spec), parts)

    return jax.tree.map(of, copies)


def processes(mesh: Mesh) -> int:
    """How many processes have devices of it."""
    return len({device.process_index for device in mesh.devices.flat})


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def check(mesh: Mesh, model, row_tokens: int) -> None:
    """Raises UserError unless every device gets equal parts of a `DecoderConfig` and whole heads of it."""
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


def devices_in_use() -> str:
    """A line about the devices that JAX has found.

    Raises:
        UserError: it finds none of the platform that JAX_PLATFORMS names.
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise UserError(
            f"JAX_PLATFORMS={wanted!r}: JAX finds no such device ({reason}); install JAX for it (pip install 'jax[cuda12]' or "
            "'jax[tpu]'), or unset the variable."
        ) from None
    kind, platform = devices[0].device_kind, devices[0].platform
    return f"device: {len(devices)} x {kind}" + (f" ({platform})" if platform not in kind.lower() else "")


def mesh_of(tree: PyTree) -> Mesh | None:
    """The run's mesh that arrays lie on, where it has several devices."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 and sharding.mesh.axis_names == AXES:
            return sharding.mesh
    return None


def inside(mesh: Mesh | None):
    """Context in which functions are traced for `mesh`: `constrain`, `at_use` and `locally` then take effect."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _current() -> jax.sharding.AbstractMesh | None:
    # The members of a sweep have a mesh of other axes, each of whose devices computes alone.
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.size == 1 or mesh.axis_names != AXES else mesh


def platform() -> str:
    """What a function that is being traced will run on."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.platform


def divides(axes: str | tuple[str, ...] | None, length: int) -> bool:
    """Whether an array's axis of this length can lie along these mesh axes of the mesh that is traced for; False without one."""
    mesh = _current()
    names = (axes,) if isinstance(axes, str) else axes or ()
    return mesh is not None and length % math.prod(mesh.shape[name] for name in names) == 0


def constrain(x: Array, *spec) -> Array:
    """`x` with its axes laid along these mesh axes, where they divide it; missing ones are whole."""
    if _current() is None or not all(divides(axes, length) for axes, length in zip(spec, x.shape, strict=False)):
        return x
    return jax.lax.with_sharding_constraint(x, P(*spec))


def as_stored(tree: PyTree) -> PyTree:
    """Every array laid out by its rule."""
    if _current() is None:
        return tree
    return jax.tree_util.tree_map_with_path(lambda path, x: jax.lax.with_sharding_constraint(x, spec_of(path)), tree)


def at_use(name: str, weight: Array) -> Array:
    """A weight, one layer's alone, put together along `fsdp`; its gradient is summed and cut along it."""
    spec = _without(rule(name), "fsdp")
    return constrain(weight, *spec[max(len(spec) - weight.ndim, 0) :])


def locally(function: Callable, in_specs, out_specs, axes: tuple[str, ...] = AXES) -> Callable:
    """`function`, called on every device with its own part along the mesh axes `axes`; the compiler sees to the others."""
    if _current() is None:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)


def _without(spec: P, axis: str | None) -> P:
    """`spec` without `axis`."""

    def cut(axes):
        if isinstance(axes, tuple):
            return tuple(a for a in axes if a != axis) or None
        return None if axes == axis else axes

    return P(*map(cut, spec))
