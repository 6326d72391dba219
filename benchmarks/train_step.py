"""One training step of a 135 M model: this package, its decoder with naive logits, and transformers on torch.

    python benchmarks/train_step.py                      # SmolLM2-135M's shape, 4 x 512 tokens, a quarter of them the policy's
    python benchmarks/train_step.py --layers=2 --tokens=128 --steps=1 --rounds=1      # a quick look
    python benchmarks/train_step.py --dtype=bfloat16 --rows=32 --tokens=2048 --steps=10                     # for a GPU

The step is forward, backward and AdamW; weights and their moments are float32, and --dtype is the dtype of products. The
loss is -mean(A log p) - 0.01 mean(entropy) over the policy tokens. All sides use the same weights and tokens and must print the
same losses, to the rounding of --dtype. Each side of each round runs in its own process, so that its peak memory is its own;
rounds go A B C A B C, and medians are reported. Needs torch.

    ours            this package: fused head on policy tokens, --remat of each layer
    naive           the same decoder, nothing recomputed, logits of every token as an array
    torch           transformers by default: SDPA attention, logits of every token; on a GPU compiled, under autocast
    torch-gathered  the same with the head applied to policy tokens only
    torch-remat     torch-gathered with every layer recomputed in the backward pass
"""

import argparse
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIDES = ("ours", "torch", "naive", "torch-gathered")  # by default
LR = 1e-5


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process, after one that is not")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--policy", type=float, default=0.25, help="share of policy tokens")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--remat", choices=("none", "attention", "full"), default="full")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--trace", metavar="FOLDER", help="write a profile of ours there")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def model(options, remat="none"):
    from epo_jax.models.decoder import DecoderConfig

    return DecoderConfig(
        49152, 576, options.layers, 9, 3, 64, 1536, rope_theta=1e5, norm_eps=1e-5, qkv_bias=False, remat=remat,
        dtype=options.dtype,
    )  # fmt: skip


def batch(options):
    """(tokens [B, T], index of the positions that predict policy tokens [B, P], labels [B, P], advantages [B, P])."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 49152, (options.rows, options.tokens)).astype(np.int32)
    count = int(options.policy * options.tokens)
    index = np.stack([np.sort(rng.choice(options.tokens - 1, count, replace=False)) for _ in tokens]).astype(np.int32)
    return tokens, index, np.take_along_axis(tokens, index + 1, axis=1), rng.normal(size=index.shape).astype(np.float32)


def flops(options) -> tuple[float, float]:
    """Arithmetic of a step: (what any step needs, what ours computes a second time).

    The backward pass computes the head's logits again, what is inside attention, and with rematerialisation every projection
    but the last.
    """
    from epo_jax.training.flops import context_flops, head_flops

    shape = model(options)
    projections, _, attention = context_flops(shape, [options.tokens] * options.rows)
    head = head_flops(shape, options.rows * int(options.policy * options.tokens))
    sizes = shape.projection_sizes()
    last = projections * math.prod(sizes["down_proj"]) / sum(map(math.prod, sizes.values()))
    scores = attention / 2
    again = {"none": scores, "attention": projections - last + scores, "full": projections - last + 3 * scores}
    return 3 * (projections + attention + head), again[options.remat] + head


def make(options) -> str:
    """Random weights in `options.folder`; the device that will compute with them."""
    import jax

    from epo_jax.models.decoder import init_params
    from epo_jax.models.weights import save_params

    params = jax.jit(init_params, static_argnums=0)(model(options), jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size % 1009), x.shape), params)
    save_params(options.folder, model(options), params)
    return jax.local_devices()[0].device_kind


def ours(options, naive: bool):
    """(step function that returns the loss, JAX's own rate at the model's products, peak of a GPU's memory or None)."""
    import jax
    import jax.numpy as jnp
    import optax

    from epo_jax.models.decoder import bind
    from epo_jax.models.weights import load_params
    from epo_jax.objectives.batch import NO_ARRAYS
    from epo_jax.objectives.head import fused_log_prob_entropy, log_prob_entropy_from_logits
    from epo_jax.training.optim import OptimConfig, make_optimizer
    from epo_jax.training.policy_tokens import head_inputs

    config = model(options, "none" if naive else options.remat)
    params = load_params(options.folder, config)
    tokens, index, labels, advantage = (jnp.asarray(x) for x in batch(options))
    positions = jnp.tile(jnp.arange(options.tokens)[None], (options.rows, 1))
    rows = NO_ARRAYS._replace(tokens=tokens, positions=positions, segment_ids=jnp.ones_like(tokens), index=index, label=labels)
    optimizer = make_optimizer(OptimConfig(LR, 10**6, warmup_ratio=0.0, floor_ratio=1.0, weight_decay=0.01))

    def loss(params, rows, advantage):
        if naive:
            module = bind(config, params)
            hidden = module(*rows[:3])
            logits = hidden @ module.output_embedding().T.astype(hidden.dtype)
            every = jnp.zeros_like(rows.tokens).at[jnp.arange(options.rows)[:, None], rows.index].set(rows.label)
            log_prob, entropy = (jnp.take_along_axis(x, rows.index, axis=1) for x in log_prob_entropy_from_logits(logits, every))
            return -(advantage * log_prob).mean() - 0.01 * entropy.mean()
        hidden, head = head_inputs(config, params, rows)
        log_prob, entropy = fused_log_prob_entropy(hidden, head.astype(hidden.dtype), rows.label.ravel())
        return -(advantage.ravel() * log_prob).mean() - 0.01 * entropy.mean()

    def update(params, opt_state, rows, advantage):
        value, gradient = jax.value_and_grad(loss)(params, rows, advantage)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = optimizer.init(params)
    update = jax.jit(update, donate_argnums=(0, 1)).lower(params, opt_state, rows, advantage).compile()
    state = [params, opt_state]
    del params, opt_state

    def step() -> float:
        *state[:], value = update(*state, rows, advantage)
        return float(value)

    def rate() -> float:
        """Operations per second of a layer's projections alone: forward, and both products of the backward pass."""
        n = options.rows * options.tokens
        shapes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
        keys = jax.random.split(jax.random.key(0), len(shapes))
        weights = [jax.random.normal(key, shape, options.dtype) for key, shape in zip(keys, shapes, strict=True)]
        inputs = {width: jax.random.normal(keys[0], (n, width), options.dtype) for width in (192, 576, 1536)}

        @jax.jit
        def products(weights, inputs):
            pairs = [(inputs[w.shape[0]], inputs[w.shape[1]]) for w in weights]
            return [(x @ w, g @ w.T, x.T @ g) for (x, g), w in zip(pairs, weights, strict=True)]

        jax.block_until_ready(products(weights, inputs))
        started = time.perf_counter()
        for _ in range(5):
            jax.block_until_ready(products(weights, inputs))
        return 5 * sum(3 * 2 * n * a * b for a, b in shapes) / (time.perf_counter() - started)

    stats = jax.local_devices()[0].memory_stats()
    return step, rate, stats and (lambda: jax.local_devices()[0].memory_stats()["peak_bytes_in_use"])


def theirs(options):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, attn_implementation="sdpa").train()
    module.to(device)
    if options.side == "torch-remat":
        module.gradient_checkpointing_enable({"use_reentrant": False})
    tokens, index, labels, advantage = (torch.from_numpy(x).to(device) for x in batch(options))
    tokens, index, labels = tokens.long(), index.long(), labels.long()
    autocast = torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16")
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)

    def loss_of(tokens, index, labels, advantage):
        with autocast:
            hidden = module.model(input_ids=tokens, use_cache=False).last_hidden_state
            chosen = index[..., None]
            if options.side == "torch":
                logits = module.lm_head(hidden)
                logits = logits.gather(1, chosen.expand(-1, -1, logits.shape[-1]))
            else:
                logits = module.lm_head(hidden.gather(1, chosen.expand(-1, -1, hidden.shape[-1])))
        log_p = torch.log_softmax(logits.float(), dim=-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return -(advantage * log_p.gather(-1, labels[..., None])[..., 0]).mean() - 0.01 * entropy.mean()

    if device == "cuda":
        loss_of = torch.compile(loss_of)

    def step() -> float:
        loss = loss_of(tokens, index, labels, advantage)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step, None, torch.cuda.max_memory_allocated if device == "cuda" else None


def host_peak() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def measure(options) -> dict:
    """One side in this process."""
    if options.side in ("ours", "naive"):
        step, rate, gpu_peak = ours(options, options.side == "naive")
    else:
        step, rate, gpu_peak = theirs(options)
    # The peak from here on, without what loading and compiling used and left to the heap.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    losses, seconds = [step()], []
    for _ in range(options.steps):
        started = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - started)
    peak = (gpu_peak or host_peak)()
    if options.trace and options.side == "ours":
        import jax

        with jax.profiler.trace(options.trace):
            step()
    return {"seconds": statistics.median(seconds), "peak": peak, "losses": losses, "rate": rate and rate()}


def main() -> None:
    options = arguments()
    if options.side == "make":
        return print(make(options))
    if options.side:
        return print(json.dumps(measure(options)))
    from epo_jax.training.flops import peak as peak_rate

    sides, results = options.sides.split(","), {}
    with tempfile.TemporaryDirectory() as folder:

        def child(side: str) -> str:
            command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}", f"--folder={folder}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
            return done.stdout

        device = child("make").splitlines()[-1]
        for _ in range(options.rounds):
            for side in sides:
                found = json.loads(child(side).splitlines()[-1])
                results.setdefault(side, []).append(found)
                print(f"{side:15s} {found['seconds']:6.2f} s  losses {' '.join(f'{x:.5f}' for x in found['losses'])}", flush=True)

    tokens = options.rows * options.tokens
    median = {s: statistics.median(r["seconds"] for r in found) for s, found in results.items()}
    peak = {s: max(r["peak"] for r in found) for s, found in results.items()}
    print(f"\n{'':15s} {'s/step':>7s} {'tokens/s':>9s} {'GB peak':>8s}" + "".join(f"  / {s}: speed, memory" for s in sides[1:]))
    for side in sides:
        told = f"{side:15s} {median[side]:7.2f} {tokens / median[side]:9.0f} {peak[side] / 1e9:8.2f}"
        for other in sides[1:]:
            told += f"  {median[other] / median[side]:.2f} x speed, {peak[side] / peak[other]:.2f} x memory"
        print(told)
    needed, again = flops(options)
    if most := peak_rate(device):
        utilisation = ", ".join(f"{side} {needed / median[side] / most:.1%}" for side in sides)
        print(f"of the {most / 1e12:.0f} TFLOP/s that a {device} does at most: {utilisation}")
    if "ours" in results:
        rate = statistics.median(r["rate"] for r in results["ours"])
        share = needed / median["ours"] / rate
        told = f"its products alone run at {rate / 1e9:.0f} GFLOP/s; ours at {share:.0%} of that"
        print(f"{told}, {share * (1 + again / needed):.0%} with what it computes again")


if __name__ == "__main__":
    main()
