"""Prefill widths, side by side: the dynamic program of `lane.pieces`, and one width that holds the longest prompt.

    python -m benchmarks.prefill                          conversations
    python -m benchmarks.prefill --context=window

The rollout of ALFWorld's `laptop` preset with random weights: 128 episodes with random actions (benchmarks/alfworld_random.py),
answers of 2 to 8 tokens, drawn by seed. Every choice of widths reads the same prompts. The choices take turns, after a round
that compiles.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np

from benchmarks.rollout import Unstopped
from epo_jax.configs import alfworld as preset
from epo_jax.envs import base
from epo_jax.envs.alfworld import protocol as alfworld
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models.decoder import decoder_config, init_params
from epo_jax.models.tokenizer import train_tokenizer
from epo_jax.rollout import collect, lane, prompts, scheduler
from epo_jax.rollout.episode import Episode, LiveEpisode


def one_of(*widths: int):
    """Widths of extends that read to the end of the longest prompt, in one call if the widest is wide enough."""

    def pieces(lengths, size):
        left, chosen = max(lengths, default=0), []
        while left > 0:
            chosen.append(next((width for width in widths if width >= left), widths[-1]))
            left -= chosen[-1]
        return chosen

    return pieces


CHOICES = {
    "dynamic program": lane.pieces,
    "one power of two": one_of(1, *(2**i for i in range(3, 11))),
    "one of the table": one_of(*lane.WIDTHS),
}


class Scripted(LiveEpisode):
    """An episode whose turns have the benchmark's lengths."""

    @property
    def turn_budget(self):
        return int(np.random.default_rng([self.episode.id, len(self.trajectory.actions)]).integers(2, 9))


class Counting(lane.Lane):
    """A lane that counts calls of extend and the tokens that they compute, padding included."""

    calls = computed = 0

    def _call(self, function, *args, shape=(), **kwargs):
        if function is self._compute.extend:
            Counting.calls, Counting.computed = Counting.calls + 1, Counting.computed + shape[0] * shape[1]
        return super()._call(function, *args, shape=shape, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", default="chat", choices=("chat", "window"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    base.ENVIRONMENTS["alfworld_random"] = "benchmarks.alfworld_random"
    collect.LiveEpisode, scheduler.Lane = Scripted, Counting

    config = preset.get_config("laptop")
    config.env.train_games = 60
    config.agent.context = options.context
    env_options = config.env.to_dict()
    tasks = alfworld.list_tasks("train", env_options)
    experts = alfworld.demonstrations(tasks, env_options)
    texts = [text for e in experts for text in (e.goal, *(o.text for o in e.observations), *e.actions)]
    tokenizer = train_tokenizer(texts, config.model.vocab_size)
    model = dataclasses.replace(decoder_config(config.model), vocab_size=tokenizer.vocab_size)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    episodes = [Episode(i, tasks[i // 8], i // 8) for i in range(128)]
    player = collect.Player(episodes, Unstopped(tokenizer.backend, tokenizer.frame, tokenizer.roles), jax.random.key(1))
    even = prompts.SamplingConfig(1e4)  # so hot that every token is as likely; else a new policy repeats one token

    seconds = {name: [] for name in CHOICES}
    with EnvPool("alfworld_random", env_options, 2) as pool:
        for measured in (False, *[True] * options.rounds):
            for name, lane.pieces in CHOICES.items():
                Counting.calls = Counting.computed = 0
                started = time.process_time()
                _, stats = collect.collect([player], params, pool, model, prompts.rollout_config(config), even)
                if measured:
                    seconds[name].append(time.process_time() - started)
                else:
                    print(f"{name}: reads {stats.prompt_tokens} tokens, computes {Counting.computed} in {Counting.calls} calls")
    for name, spent in seconds.items():
        print(f"{name}: {statistics.median(spent):.2f} CPU seconds a rollout ({min(spent):.2f} to {max(spent):.2f})")


if __name__ == "__main__":
    main()
