"""Speed of multi-turn rollout: this package, and transformers' generate with whole and with continued prompts.

    python -m benchmarks.rollout                                 all of them: 32 ALFWorld episodes of up to 15 turns
    python -m benchmarks.rollout --only=ours --turns=5           one of them, shorter
    python -m benchmarks.rollout --run=runs/first                an RL step's rollout of a run's agent instead
    python -m benchmarks.rollout --only=record                   writes episodes.json for benchmarks/rollout_tunix.py

A model of SmolLM2-135M's shape with random weights, float32, plays the real engine. Its answers are replaced by random actions
(benchmarks/alfworld_random.py), and the length of each answer is drawn by seed, 8 to 40 tokens, so all sides read and
write the same number of tokens in the same episodes. transformers needs torch, which this project does not install.

ours        `collect`: the cache lives across turns; lanes of slots work while others wait for their environments
whole       one batch in lock-step; each turn reads the whole conversation again, as in the reference implementation
continued   the same with a cache that lives across turns: only new tokens are read, in lock-step and padded to one length
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.decode import MODELS
from epo_jax.envs import agent, base
from epo_jax.envs.alfworld import protocol as alfworld
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models.decoder import init_params
from epo_jax.models.tokenizer import ChatTokenizer, train_tokenizer
from epo_jax.rollout import collect, prompts
from epo_jax.rollout.episode import Episode, LiveEpisode
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.training.tasks import step_episodes

SHAPE = MODELS["smollm2-135m"]
OPTIONS = {
    "data_dir": "", "train_games": 40, "valid_seen_games": 6, "valid_unseen_games": 6, "max_receptacles": 20, "seed": 0,
    "workers": 2, "max_turns": 15,
}  # fmt: skip
LONGEST = 40


def answer_length(episode: int, turn: int) -> int:
    return int(np.random.default_rng([episode, turn]).integers(8, LONGEST + 1))


def words():
    """A byte-level BPE of the game's texts; the model's vocabulary is far larger, as a language model's is."""
    tasks = alfworld.list_tasks("train", OPTIONS)
    demonstrations = alfworld.demonstrations(tasks, OPTIONS)
    texts = [text for d in demonstrations for text in (d.goal, *(o.text for o in d.observations), *d.actions)]
    instructions = agent.first_message(base.Observation(text="", goal=""), "tagged")
    return train_tokenizer([*texts, *[instructions] * 20], 2048), tasks


class Scripted(LiveEpisode):
    """An episode whose turns have the benchmark's lengths."""

    @property
    def turn_budget(self):
        return answer_length(self.episode.id, len(self.trajectory.actions))


class Unstopped(ChatTokenizer):
    """A tokenizer without a token that ends a turn."""

    stop_ids = (-1,)


def ours(args, tokenizer, tasks):
    params = jax.jit(init_params, static_argnums=0)(args.model, jax.random.key(0))
    config = prompts.RolloutConfig(
        slots=args.slots, max_turns=args.turns, max_tokens=4096, max_policy_tokens=4096, response_tokens=LONGEST,
        style="tagged", lanes=args.lanes, block=args.block,
    )  # fmt: skip
    collect.LiveEpisode = Scripted
    episodes = [Episode(i, tasks[i]) for i in range(args.episodes)]
    player = collect.Player(episodes, Unstopped(tokenizer.backend, tokenizer.frame, tokenizer.roles), jax.random.key(1))
    for name in ("compiling", "ours"):
        with EnvPool("alfworld_random", OPTIONS, 2) as pool:
            (trajectories,), stats = collect.collect([player], params, pool, args.model, config, prompts.SamplingConfig(1.0))
        report(name, stats.seconds, trajectories, {
            "prefill": stats.prefill_seconds, "decode": stats.decode_seconds, "waiting for environments": stats.env_wait_seconds,
        }, f"{stats.prompt_tokens} tokens read; prefill and decode are summed over lanes that overlap")  # fmt: skip


def report(name, seconds, trajectories, parts, told=""):
    tokens = sum(t.num_policy_tokens for t in trajectories)
    shares = ", ".join(f"{part} {spent:.1f} s ({spent / seconds:.0%})" for part, spent in parts.items())
    print(
        f"{name}: {seconds:.1f} s, {tokens / seconds:.0f} policy tokens/s, {60 * len(trajectories) / seconds:.1f} episodes/min, "
        f"{tokens} policy tokens in {sum(len(t.actions) for t in trajectories)} turns: {shares}. {told}",
        flush=True,
    )


def hugging_face(args, tokenizer, tasks, keep_cache: bool):
    import torch
    import transformers

    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=SHAPE.vocab_size, hidden_size=SHAPE.d_model, intermediate_size=SHAPE.d_ff, num_hidden_layers=args.layers,
        num_attention_heads=SHAPE.num_heads, num_key_value_heads=SHAPE.num_kv_heads, tie_word_embeddings=True,
        max_position_embeddings=8192,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(shape).eval()
    first_token = []

    def note_time(ids, scores, **_):
        first_token.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    clock = transformers.StoppingCriteriaList([note_time])
    trajectories = [Trajectory(task=tasks[i]) for i in range(args.episodes)]
    read = [0] * args.episodes
    spent = dict.fromkeys(("prefill", "decode", "environment"), 0.0)
    started = time.perf_counter()
    with EnvPool("alfworld_random", OPTIONS, 2) as pool, torch.inference_mode():
        for i in range(args.episodes):
            pool.reset(i, tasks[i])
        seen = dict(pool.get() for _ in range(args.episodes))
        spent["environment"] += time.perf_counter() - started
        rows, turn = list(range(args.episodes)), 0
        ids = mask = torch.zeros((args.episodes, 0), dtype=torch.long)
        cache = transformers.DynamicCache()
        while rows and turn < args.turns:
            for i in rows:
                message = (agent.next_message if turn else agent.first_message)(seen[i], "tagged")
                trajectories[i].append_prompt(tokenizer.following(message, None) if turn else tokenizer.first(message))
            if not keep_cache:  # all that was said, of the episodes that go on
                ids, mask = padded([t.tokens if i in rows else [0] for i, t in enumerate(trajectories)], torch)
                ids, mask, cache = ids[rows], mask[rows], transformers.DynamicCache()
            else:
                new = [trajectories[i].tokens[read[i] :] if i in rows else [] for i in range(args.episodes)]
                more, more_mask = padded(new, torch)
                ids, mask = torch.cat([ids, more], 1), torch.cat([mask, more_mask], 1)
            lengths = {i: answer_length(i, turn) for i in rows}
            longest, before = max(lengths.values()), ids.shape[1]
            first_token.clear()
            asked = time.perf_counter()
            ids = model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=longest, min_new_tokens=longest,
                do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None, stopping_criteria=clock,
            )  # fmt: skip
            spent["prefill"] += first_token[0] - asked
            spent["decode"] += time.perf_counter() - first_token[0]
            mask = torch.cat([mask, torch.zeros((len(ids), longest), dtype=torch.long)], 1)
            asked = time.perf_counter()
            for place, i in enumerate(rows):
                row, t = (i if keep_cache else place), trajectories[i]
                mask[row, before : before + lengths[i]] = 1
                said = ids[row, before : before + lengths[i]].tolist()
                t.append_answer(said, [0.0] * len(said), [0.0] * len(said))
                read[i] = len(t.tokens)
                t.actions.append("")
                pool.step(i, "")
            seen |= dict(pool.get() for _ in rows)
            spent["environment"] += time.perf_counter() - asked
            rows, turn = [i for i in rows if not seen[i].done], turn + 1
    seconds = time.perf_counter() - started
    report("continued" if keep_cache else "whole", seconds, trajectories, spent)


def record(args, tokenizer, tasks):
    """Writes what each turn of each episode reads and how much it says, for contenders in environments of their own."""
    episodes = []
    with EnvPool("alfworld_random", OPTIONS, 2) as pool:
        for i in range(args.episodes):
            pool.reset(i, tasks[i])
            _, seen = pool.get()
            turns = []
            while not seen.done and len(turns) < args.turns:
                message = (agent.next_message if turns else agent.first_message)(seen, "tagged")
                prompt = tokenizer.following(message, None) if turns else tokenizer.first(message)
                turns.append({"prompt": prompt, "answer": answer_length(i, len(turns))})
                pool.step(i, "")
                _, seen = pool.get()
            episodes.append(turns)
    Path("episodes.json").write_text(json.dumps(episodes))


def padded(rows, torch):
    """(ids, mask), padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], dtype=torch.long)
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)


def of_run(args):
    """An RL step's rollout by the agent of a run folder, four times; the first compiles."""
    from epo_jax.runs.policies import load
    from epo_jax.settings.config import base_config

    policy = load(args.run, None, base_config())
    config = policy.config
    config.rollout.update(slots=args.slots, lanes=args.lanes)
    options = config.env.to_dict()
    environment = base.environment(config.env.name)
    environment.prepare(options)
    tasks = environment.list_tasks("train", options)
    settings = prompts.rollout_config(config)
    with EnvPool(config.env.name, options, config.env.workers) as pool:
        for step in range(4):
            episodes = step_episodes(tasks, config, step, 0)
            player = collect.Player(episodes, policy.tokenizer, jax.random.key(1))
            (trajectories,), stats = collect.collect(
                [player], policy.params, pool, policy.model, settings, prompts.SamplingConfig(1.0)
            )
            report(f"step {step}", stats.seconds, trajectories, {
                "prefill": stats.prefill_seconds, "decode": stats.decode_seconds,
                "waiting for environments": stats.env_wait_seconds,
            })  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="ours,whole,continued")
    parser.add_argument("--run", help="a run folder")
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--block", type=int, default=LONGEST, help="tokens that a lane samples between prompts")
    parser.add_argument("--layers", type=int, default=SHAPE.num_layers, help="fewer, to see that it runs")
    args = parser.parse_args()
    args.model = dataclasses.replace(SHAPE, num_layers=args.layers)
    if args.run:
        return of_run(args)
    base.ENVIRONMENTS["alfworld_random"] = "benchmarks.alfworld_random"
    names = args.only.split(",")
    tokenizer, tasks = words()
    contenders = {
        "ours": lambda: ours(args, tokenizer, tasks),
        "record": lambda: record(args, tokenizer, tasks),
        "whole": lambda: hugging_face(args, tokenizer, tasks, keep_cache=False),
        "continued": lambda: hugging_face(args, tokenizer, tasks, keep_cache=True),
    }
    for name in names:
        contenders[name]()


if __name__ == "__main__":
    main()
