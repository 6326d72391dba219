"""Weights straight onto a mesh: every device its own slice, and little more than one tensor in host memory."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from epo_jax.models import weights
from epo_jax.models.decoder import DecoderConfig, init_params

CONFIG = DecoderConfig(64, 32, 3, 4, 2, 16, 48, tie_embeddings=False)
fresh = jax.jit(init_params, static_argnums=0)


def shardings(config, mesh):
    """Words and outputs over "tensor", inputs over "fsdp"; vectors and the axis of layers whole."""
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    specs = {1: P(), 2: P("tensor", "fsdp")}
    layer_specs = {2: P(), 3: P(None, "fsdp", "tensor")}
    layers = {key: layer_specs[shape.ndim] for key, shape in shapes["layers"].items()}
    chosen = {key: specs[shape.ndim] for key, shape in shapes.items() if key != "layers"} | {"layers": layers}
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), chosen, is_leaf=lambda x: isinstance(x, P))


def test_every_device_gets_its_slice_and_reads_no_other(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), fresh(CONFIG, jax.random.key(0)))
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    weights.save_params(tmp_path, CONFIG, params)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3 and (tmp_path / "model.safetensors.index.json").exists()

    read = []

    class Counted:
        def __init__(self, stored):
            self.stored = stored

        def __getitem__(self, index):
            part = self.stored[index]
            read.append(part.size)
            return part

    checked = weights._checked_tensors
    monkeypatch.setattr(weights, "_checked_tensors", lambda *a: {name: Counted(t) for name, t in checked(*a).items()})
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    wanted = shardings(CONFIG, mesh)
    loaded = weights.load_params(tmp_path, CONFIG, wanted)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), loaded, wanted))
    assert max(read) == 64 * 32 // 8  # one device's share of the largest tensor


_PROGRAM = """
import sys, threading, jax
from pathlib import Path
from epo_jax.models import weights
from tests.models.test_sharded_weights import BIG, CONFIG, shardings

def resident():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
folder, small = map(Path, sys.argv[1:])
weights.load_params(small, CONFIG, shardings(CONFIG, mesh))
before, peak, done = resident(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, resident())

thread = threading.Thread(target=watch)
thread.start()
loaded = jax.block_until_ready(weights.load_params(folder, BIG, shardings(BIG, mesh)))
done.set()
thread.join()
print(peak - before - sum(x.nbytes for x in jax.tree.leaves(loaded)))
"""
BIG = dataclasses.replace(CONFIG, vocab_size=16384, d_model=512, d_ff=2048, head_dim=128, num_layers=6)  # 166 MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_host_memory_stays_under_two_tensors_above_the_shards(tmp_path):
    weights.save_params(tmp_path / "big", BIG, fresh(BIG, jax.random.key(0)))
    weights.save_params(tmp_path / "small", CONFIG, fresh(CONFIG, jax.random.key(0)))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, tmp_path / "big", tmp_path / "small"],
        cwd=root, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    largest = 4 * BIG.vocab_size * BIG.d_model
    assert int(done.stdout) < 2 * largest, f"{int(done.stdout) / largest:.2f} largest tensors above the shards"
    print(f"{int(done.stdout) / largest:.2f} largest tensors above the shards")
