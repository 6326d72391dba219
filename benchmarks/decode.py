"""Speed of decode, relative to the bound of memory and arithmetic, and of prefill.

    python benchmarks/decode.py                                                             # 16 rows of SmolLM2-135M's shape
    python benchmarks/decode.py --model=qwen2.5-3b --dtype=bfloat16 --slots=128 --context=1024           # for a GPU

The bound of a decode step is the longer of two times: to read the weights and the whole cache once, and to do the arithmetic,
at the measured rates of a sum over 512 MB and a product of large matrices. A step is one more token in every row; a call is
`generate.decode` with a block of --block tokens, including its fixed costs and without the host's part of a turn.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from epo_jax.models import generate
from epo_jax.models.decoder import DecoderConfig, init_params, unstack

MODELS = {
    "smollm2-135m": DecoderConfig(49152, 576, 30, 9, 3, 64, 1536, rope_theta=1e5, norm_eps=1e-5, qkv_bias=False),
    "qwen2.5-3b": DecoderConfig(151936, 2048, 36, 16, 2, 128, 11008),
}


def best(function, repeats=5) -> float:
    """Seconds of the quickest of some calls, after one that is not timed."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - started)
    return min(times[1:])


def rates(dtype: str) -> tuple[float, float]:
    """(bytes read per second, operations per second of large products)."""
    big = jnp.ones((1 << 27,), jnp.float32)
    side = 8192 if jax.default_backend() == "gpu" else 2048
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    total, product = jax.jit(jnp.sum), jax.jit(jnp.matmul)
    return big.nbytes / best(lambda: total(big), 20), 2 * side**3 / best(lambda: product(square, square), 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cache-dtype", choices=("int8",))
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--context", type=int, default=512, help="tokens that a row has room for; all but --block are used")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--width", type=int, default=64, help="new tokens of each row in prefill")
    parser.add_argument("--layers", type=int, help="fewer, to see that it runs")
    parser.add_argument("--trace", metavar="FOLDER", help="write a profile of one decode call there")
    args = parser.parse_args()
    model = dataclasses.replace(MODELS[args.model], dtype=args.dtype)
    if args.layers:
        model = dataclasses.replace(model, num_layers=args.layers)
    slots, used = args.slots, args.context - args.block - 1

    bandwidth, rate = rates(args.dtype)
    params = jax.jit(lambda key: unstack(model, init_params(model, key)))(jax.random.key(0))
    cache = [generate.init_cache(model, slots, args.context, args.cache_dtype)]
    ints = {name: np.zeros(slots, np.int32) for name in ("episode", "turn", "position")}
    how = generate.Sampling(np.ones(slots, np.float32), np.zeros(slots, np.int32), np.ones(slots, np.float32))

    def decode(count):
        cache[0] = cache[0]._replace(lengths=jnp.full((slots,), used, jnp.int32))
        cache[0], out = generate.decode(
            model, params, cache[0], jax.random.key(0), **ints, budget=np.full(slots, count, np.int32), sampling=how,
            stop_tokens=np.array([-1], np.int32), block=args.block,
        )  # fmt: skip
        return out

    def prefill():
        cache[0] = cache[0]._replace(lengths=jnp.full((slots,), used - args.width, jnp.int32))
        tokens, counts = np.ones((slots, args.width), np.int32), np.full(slots, args.width, np.int32)
        cache[0] = generate.extend(model, params, cache[0], tokens, counts, np.zeros(slots, bool))
        return cache[0]

    call = best(lambda: decode(args.block))
    step = (call - best(lambda: decode(1))) / (args.block - 1)
    read = best(prefill)
    weights = sum(x.size for x in jax.tree.leaves(params))
    held = sum(x.nbytes for x in jax.tree.leaves((params, cache[0].layers)))
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * args.context
    per_token, per_read = 2 * weights + attention, 2 * (weights - model.vocab_size * model.d_model) + attention
    by_memory, by_arithmetic = held / bandwidth, slots * per_token / rate
    device, bound = jax.local_devices()[0].device_kind, max(by_memory, by_arithmetic)
    arithmetic = slots * args.width * per_read / read / rate
    for line in (
        f"{args.model}, {args.dtype}, {device}: {slots} rows with {args.context} tokens, {held / 1e9:.2f} GB of weights, cache",
        f"decode: {1e3 * step:.2f} ms a step, {slots / step:.0f} tokens/s, {bound / step:.0%} of the bound: memory "
        f"{1e3 * by_memory:.2f} ms ({bandwidth / 1e9:.0f} GB/s), "
        f"arithmetic {1e3 * by_arithmetic:.2f} ms ({rate / 1e12:.2f} TFLOP/s)",
        f"a call of {args.block} tokens: {1e3 * call:.1f} ms, {slots * args.block / call:.0f} tokens/s",
        f"prefill of {args.width} tokens a row: {1e3 * read:.1f} ms, {slots * args.width / read:.0f} tokens/s, "
        f"{arithmetic:.0%} of the arithmetic's rate",
    ):
        print(line, flush=True)
    if args.trace:
        with jax.profiler.trace(args.trace):
            jax.block_until_ready(decode(args.block))


if __name__ == "__main__":
    main()
