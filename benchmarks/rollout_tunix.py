"""google-tunix's sampler on the episodes of benchmarks/rollout.py, in its own virtual environment.

    python -m venv tunix && tunix/bin/pip install google-tunix
    python -m benchmarks.rollout --only=record && tunix/bin/python benchmarks/rollout_tunix.py episodes.json

Episodes advance in lock-step, and each turn reads the whole conversation again, as in tunix's agentic rollout. The time of the
environment is left out. Everything is played twice, since each new prompt length is compiled: the second time counts.
"""

import json
import sys
import time
from pathlib import Path

from flax import nnx
from tunix.generate import sampler
from tunix.models.llama3 import model as llama


class Ids:
    """Texts are ids written out."""

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


def play(generate, episodes):
    """(seconds, policy tokens)"""
    said, started = [[] for _ in episodes], time.perf_counter()
    tokens = 0
    for turn in range(max(map(len, episodes))):
        for ids, turns in zip(said, episodes, strict=True):
            ids += turns[turn]["prompt"] if turn < len(turns) else []
        live = [i for i, turns in enumerate(episodes) if turn < len(turns)]
        longest = max(episodes[i][turn]["answer"] for i in live)
        texts = [" ".join(map(str, ids)) if i in live else "1" for i, ids in enumerate(said)]
        out = generate(texts, max_generation_steps=longest, temperature=1.0, top_p=1.0, eos_tokens=[49151], seed=turn)
        for i in live:
            n = episodes[i][turn]["answer"]
            said[i] += ([int(x) for x in out.tokens[i]] + [3] * n)[:n]
            tokens += n
    return time.perf_counter() - started, tokens


def main():
    episodes = json.loads(Path(sys.argv[1]).read_text())
    config = llama.ModelConfig(
        num_layers=30, vocab_size=49152, embed_dim=576, hidden_dim=1536, num_heads=9, head_dim=64, num_kv_heads=3,
        rope_theta=100_000, norm_eps=1e-5, weight_tying=True,
    )  # fmt: skip
    # The sampler pads a prompt to a power of two, and the answer comes on top.
    longest = max(sum(len(turn["prompt"]) + turn["answer"] for turn in turns) for turns in episodes)
    cache = sampler.CacheConfig(cache_size=2 << longest.bit_length(), num_layers=30, num_kv_heads=3, head_dim=64)
    generate = sampler.Sampler(llama.Llama3(config, rngs=nnx.Rngs(0)), Ids(), cache)
    for name in ("compiling", "tunix"):
        seconds, tokens = play(generate, episodes)
        print(
            f"{name}: {seconds:.1f} s, {tokens / seconds:.0f} policy tokens/s, {60 * len(episodes) / seconds:.1f} episodes/min",
            flush=True,
        )


if __name__ == "__main__":
    main()
