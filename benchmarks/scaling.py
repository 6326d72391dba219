"""Memory and time of the paper's run on TPU slices, from the compiler and from arithmetic; writes docs/scaling.md.

    pip install "libtpu==0.0.42.*"           # the TPU compiler; no TPU is needed. The version is that of jax's extra "tpu".
    python benchmarks/scaling.py             # every row, each compiled in a process of its own; minutes a row
    python benchmarks/scaling.py --layers=2 --only="Qwen2.5-3B v5e-16" --out=/tmp/quick.md

The largest programs of a run are compiled ahead of time, from abstract shapes and without a slice: the train step (on the
rows of the paper preset), the unstacking of the weights and one block of decode (on the slots of one lane, at full context).
Nothing is allocated, no weights are read, and the compiler refuses a program that does not fit the chip. With --on=cpu the
programs are compiled for as many fake CPU devices instead, whose memory layout and schedule differ.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# What the paper trains: the shapes of the two models' config.json.
MODELS = {
    "Qwen2.5-3B": dict(vocab_size=151936, d_model=2048, num_layers=36, num_heads=16, num_kv_heads=2, head_dim=128, d_ff=11008),
    "Qwen2.5-7B": dict(
        vocab_size=152064, d_model=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, d_ff=18944,
        tie_embeddings=False,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of the public data sheet: memory and bandwidth in bytes. `kind` names it in `epo_jax.training.flops.PEAK`."""

    memory: float
    bandwidth: float
    kind: str


CHIPS = {"v5e": Chip(16e9, 819e9, "TPU v5e"), "v5p": Chip(95e9, 2765e9, "TPU v5p")}

# (model, slice, topology, (data, fsdp, tensor)).
ROWS = (
    ("Qwen2.5-3B", "v5e-16", "v5e:4x4", (1, 8, 2)),
    ("Qwen2.5-7B", "v5e-16", "v5e:4x4", (1, 4, 4)),
    ("Qwen2.5-3B", "v5p-64", "v5p:4x4x4", (1, 64, 1)),
    ("Qwen2.5-7B", "v5p-64", "v5p:4x4x4", (1, 64, 1)),
)

# Of the estimate: an episode's turns, the tokens of a turn's prompt and answer, and how close programs come to the chip's limits.
TURNS, PROMPT, ANSWER = 30, 900, 120
MFU, BANDWIDTH = 0.4, 0.6


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--on", choices=("tpu", "cpu"), default="tpu")
    parser.add_argument("--layers", type=int, default=0, help="of every model; 0 = its own")
    parser.add_argument("--only", default="", help='model and slice, such as "Qwen2.5-3B v5e-16"; "" = all')
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "scaling.md")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def programs(row: int, options) -> dict:
    """Compiles the programs of a row; bytes per device."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    from epo_jax.configs import alfworld
    from epo_jax.models import generate
    from epo_jax.models.decoder import DecoderConfig, init_params, param_axes, unstack
    from epo_jax.parallel import mesh
    from epo_jax.training.from_config import learner_config, objective_and_hyper
    from epo_jax.training.state import abstract_state_on
    from epo_jax.training.step import batch_shardings, make_train_step

    name, _, topology, shape = ROWS[row]
    if options.on == "tpu":
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    else:
        devices = jax.devices()
    on = mesh.make_mesh(*shape, devices=devices)
    config = alfworld.get_config()
    model = DecoderConfig(**MODELS[name], dtype=config.model.dtype, remat=config.model.remat)
    model = dataclasses.replace(model, num_layers=options.layers or model.num_layers)
    mesh.check(on, model, config.train.rows_tokens)
    objective, hyper = objective_and_hyper(config)
    learner = learner_config(config, model, objective, mesh.row_shards(on))

    def placed(tree, where):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)

    def held(tree) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    def compiled(what: str, lowered):
        """A program, and its bytes at the peak: arguments, results and temporaries that are alive together, and the code."""
        started = time.perf_counter()
        program = lowered.compile()
        print(f"{name} {what}: compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        memory = program.memory_analysis()
        return program, memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes

    state = abstract_state_on(learner, on)
    rows = placed(batch(config, learner), batch_shardings(on))
    _, train = compiled("train step", make_train_step(learner, on).lower(state, rows, hyper))

    weights = jax.eval_shape(lambda k: jax.tree.map(lambda x: x.astype(model.dtype), init_params(model, k)), jax.random.key(0))
    weights = placed(weights, mesh.shardings(on, weights, param_axes(model), without="fsdp"))
    with mesh.inside(on):
        program, unstacking = compiled("unstacking", unstack.lower(model, weights))
    weights = placed(jax.eval_shape(functools.partial(unstack, model), weights), program.output_shardings)
    shards = mesh.row_shards(on)
    slots = -(-config.rollout.slots // (config.rollout.lanes * shards)) * shards
    cache = jax.eval_shape(lambda: generate.init_cache(model, slots, config.agent.max_tokens))
    cache = placed(cache, mesh.shardings(on, cache, generate.cache_axes(cache)))
    ints, floats = np.ones(slots, np.int32), np.ones(slots, np.float32)
    with mesh.inside(on):
        lowered = generate.decode.lower(
            model, weights, cache, jax.eval_shape(lambda: jax.random.key(0)), ints, ints, ints, ints,
            generate.Sampling(floats, ints, floats), np.ones(1, np.int32), block=config.rollout.block,
        )  # fmt: skip
        _, decode = compiled("decode", lowered)
    lanes = held(cache) * config.rollout.lanes
    return {
        "train": train,
        "decode": decode,
        "state": held(state),
        "weights": held(weights),
        "lanes": lanes,
        "rollout": held(state) + max(unstacking, decode + lanes - held(cache)),
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(weights)),
    }


def batch(config, learner):
    """The abstract batch of one RL step, shaped as `pack` would."""
    import jax
    import numpy as np

    from epo_jax.objectives.batch import TokenBatch
    from epo_jax.training.batch import batch_shape

    n, shape = config.rollout.groups * config.rollout.group_size, batch_shape(config, learner.objective, learner.micro_rows)
    minis, rows = shape.mini_batches, shape.rows(n)
    floating = ("policy_mask", "reward", "valid", "behaviour_log_prob", "behaviour_entropy", "returns")
    shapes = dict.fromkeys(TokenBatch._fields, (minis, rows, config.train.rows_policy_tokens))
    shapes |= dict.fromkeys(("tokens", "positions", "segment_ids"), (minis, rows, config.train.rows_tokens))
    shapes |= {"rows": (minis,), "returns": (n,), "group": (n,), "anchor": (n, config.env.max_turns), "episode": (n,), "seed": ()}
    types = {name: np.float32 if name in floating else np.int32 for name in shapes} | {"seed": np.uint32}
    return TokenBatch(**{name: jax.ShapeDtypeStruct(shape, types[name]) for name, shape in shapes.items()})


def seconds(row: int) -> dict[str, float]:
    """Estimated seconds of an RL step's parts, by arithmetic alone."""
    from epo_jax.configs import alfworld
    from epo_jax.training.flops import PEAK

    name, slice_name, _, (data, fsdp, tensor) = ROWS[row]
    m, chip, devices, config = MODELS[name], CHIPS[slice_name.split("-")[0]], data * fsdp * tensor, alfworld.get_config()
    width, heads = m["d_model"], m["num_heads"] * m["head_dim"]
    key_values = 2 * m["num_kv_heads"] * m["head_dim"]
    layers = m["num_layers"] * (width * (2 * heads + key_values) + 3 * width * m["d_ff"])
    head = m["vocab_size"] * width
    episodes, length = config.rollout.groups * config.rollout.group_size, config.train.rows_tokens
    tokens, answers = episodes * TURNS * (PROMPT + ANSWER), episodes * TURNS * ANSWER
    # Forward 2, backward 4, recomputation 2, reference 2 per weight and token; causal attention over the packed row.
    attention = m["num_layers"] * 2 * length * heads
    train = tokens * (10 * layers + 5.5 * attention) + answers * 10 * head
    prefill = episodes * TURNS * PROMPT * 2 * layers
    read = 2 * (layers + head) / tensor
    slots = config.rollout.slots / config.rollout.lanes / (data * fsdp)
    cached = slots * (PROMPT + ANSWER / 2) * m["num_layers"] * key_values * 2 / tensor
    passes = TURNS * ANSWER * config.rollout.lanes
    return {
        "prefill": prefill / (devices * PEAK[chip.kind] * MFU),
        "decode": passes * (read + cached) / (chip.bandwidth * BANDWIDTH),
        "update": train / (devices * PEAK[chip.kind] * MFU),
    }


def page(rows: dict[int, dict], options) -> str:
    from epo_jax.configs import alfworld

    config = alfworld.get_config()
    command = "python benchmarks/scaling.py" + (" --on=cpu" if options.on == "cpu" else "")
    compiler = "the TPU compiler (libtpu), without a TPU" if options.on == "tpu" else "XLA for as many fake CPU devices"
    lines = [
        "# Scaling",
        "",
        f"Written by `{command}`; do not edit. Models and settings are those of `alfworld:paper`, compiled ahead of",
        f"time from abstract shapes by {compiler}. No number on this page was measured on a slice.",
        "",
        "## Memory per device",
        "",
        "GB (10^9 bytes) on one chip. *State* is weights, Adam's moments, the reference policy and the history. The memory of",
        "a program is its code plus arguments, results and temporaries at the peak that the compiler reports. *Decode* is one",
        "lane at full context; *rollout* adds the state and the caches of the other lanes, or, if that is more, is the state",
        "plus the unstacking of the weights, which exist twice at that point.",
        "",
        "| model | slice | data x fsdp x tensor | state | sampling weights | caches | train step | decode | rollout | chip |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    fits = True
    for row, found in rows.items():
        name, slice_name, _, shape = ROWS[row]
        chip = CHIPS[slice_name.split("-")[0]]
        fits &= max(found["train"], found["rollout"]) <= chip.memory
        numbers = [found[what] for what in ("state", "weights", "lanes", "train", "decode", "rollout")]
        cells = [name, slice_name, " x ".join(map(str, shape)), *(f"{x / 1e9:.1f}" for x in numbers), f"{chip.memory / 1e9:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Every program fits." if fits else "**Not every program fits.**",
        "",
        "## Estimated seconds of an RL step",
        "",
        f"{config.rollout.groups} x {config.rollout.group_size} episodes. Computed by arithmetic, assuming {TURNS} turns per",
        f"episode, each with a prompt of {PROMPT} tokens, prefilled in full, and an answer of {ANSWER}; prefill and update reach",
        f"{MFU:.0%} of the chip's bfloat16 rate, decode {BANDWIDTH:.0%} of its bandwidth (every pass reads the weights and the",
        "caches of one lane). The update recomputes every layer and scores the reference policy. Environments answer while",
        "another lane decodes and take no time; neither does communication between chips.",
        "",
        "| model | slice | prefill | decode | update | RL step | 150 RL steps, hours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        parts = seconds(row)
        total = sum(parts.values())
        cells = [*ROWS[row][:2], *(f"{x:.0f}" for x in (*parts.values(), total)), f"{150 * total / 3600:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    options = arguments()
    if options.row is not None:
        print(json.dumps(programs(options.row, options)))
        return 0
    found = {}
    for row, (name, slice_name, _, shape) in enumerate(ROWS):
        if options.only in ("", f"{name} {slice_name}"):
            fake = f"--xla_force_host_platform_device_count={math.prod(shape)}"
            # Without these variables libtpu queries the cloud for its location.
            told = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
            told |= {"XLA_FLAGS": fake, "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
            command = [sys.executable, __file__, f"--row={row}", f"--on={options.on}", f"--layers={options.layers}"]
            done = subprocess.run(command, env=os.environ | told, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{name} on {slice_name} does not compile; its reason is above.", file=sys.stderr)
                return 1
            found[row] = json.loads(done.stdout.splitlines()[-1])
            print(name, slice_name, found[row], file=sys.stderr, flush=True)
    options.out.write_text(page(found, options))
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
