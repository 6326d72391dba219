"""The frozen base of a run with adapters: stored once or by reference, and not in each checkpoint.

RUN/model/base.json has its place and its digest, which detects another model:

    {"folder": null, "digest": ...}     the model that config.model.path names, as it was published
    {"folder": PATH, "digest": ...}     a model folder, relative to RUN/model: "." where the run stored it there itself
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from epo_jax.common.errors import UserError, explain
from epo_jax.common.files import write_atomically
from epo_jax.models import hub, weights
from epo_jax.models.decoder import DecoderConfig, Params
from epo_jax.parallel import hosts
from epo_jax.runs import checkpoint

FILE = "base.json"


def digest(base: Params) -> str:
    """16 hexadecimal digits that depend on every bit of the base, and on neither its devices nor the file it came from."""
    sums = jax.tree.map(int, jax.device_get(jax.jit(lambda tree: jax.tree.map(_sum, tree))(base)))
    named = {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(sums)}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]


def _sum(x):
    """The sum, modulo 2^32 and so in any order, of a hash (murmur3's finalizer) of each number's bits and place."""
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) ^ (place * jnp.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def store(run: Path, model: DecoderConfig, base: Params) -> None:
    """Writes the base into the run folder, as a model folder. All processes take part; the first one writes."""

    def on_host(x) -> np.ndarray:
        return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)

    whole, folder = jax.tree.map(on_host, base), Path(run) / "model"
    if hosts.is_first():
        weights.save_params(folder, dataclasses.replace(model, lora=None), whole)
    refer(run, digest(base), ".")


def refer(run: Path, digest: str, folder: str | None) -> None:
    """Writes where the base of this digest is: in `folder`, relative to RUN/model, or None for what config.model.path names."""
    content = {"folder": folder, "digest": digest}
    if hosts.is_first():
        (Path(run) / "model").mkdir(exist_ok=True)
        write_atomically(Path(run) / "model" / FILE, json.dumps(content) + "\n")


def load(run: Path, config, model: DecoderConfig, like: Params, step: int | None = None) -> Params:
    """The base of a run.

    Args:
        like: abstract arrays of its shapes and placement.
        step: of the checkpoint that holds it, in a run of a version that had it in each; the newest if None.

    Raises:
        UserError: it is not there, or what is there now is another one.
    """
    if not is_kept(run):
        with checkpoint.open_reader(checkpoint.place(run, config.checkpoint.folder)) as manager:
            return checkpoint.restore_fields(manager, {"base": like}, step)["base"]
    kept = _read(run)
    try:
        where = hub.resolve(config.model.path) if kept["folder"] is None else Path(run) / "model" / kept["folder"]
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda x: x.sharding or device, like)
        base = weights.load_params(where, dataclasses.replace(model, lora=None), places)
    except UserError as error:
        if kept["folder"] is not None:
            raise
        reason = str(error).rstrip(".")
        raise UserError(f"The adapters in {run} need the model that they were trained on: {reason}; name it with "
                        "--config.model.path=FOLDER.") from error  # fmt: skip
    if digest(base) != kept["digest"]:
        raise UserError(
            f"{where} is not the model that the adapters in {run} were trained on, as its weights differ; name that one with "
            "--config.model.path=FOLDER."
        )
    return base


def is_kept(run: Path) -> bool:
    """Whether the run's base is stored, or referred to, outside its checkpoints."""
    return (Path(run) / "model" / FILE).exists()


def copy(source: Path, run: Path, model: DecoderConfig, base: Params) -> None:
    """Keeps the base of the run `source` for the run `run`: by reference where the source has it so."""
    if is_kept(source) and _read(source)["folder"] is None:
        refer(run, digest(base), None)
    else:
        store(run, model, base)


def _read(run: Path) -> dict[str, str | None]:
    path = Path(run) / "model" / FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {name: kept[name] for name in ("folder", "digest")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read {explain(error, 'put a copy back')}.") from None
