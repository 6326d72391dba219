"""ScienceWorld: elementary-school experiments in the real simulator.

    epo-jax train runs/scienceworld --config=scienceworld:laptop

Presets
    paper   (default) Qwen2.5-7B-Instruct with the paper's settings, on all 30 tasks: 125 RL steps of 16 variations x 8 episodes
            in mini-batches of 128 turns; with --config.algo.name=ppo+epo and other variants of ppo, 128 variations x 1 episode in
            mini-batches of 64 turns, at a learning rate of 3e-6 in place of 5e-6
    laptop  a model of about a million parameters from scratch, on five short tasks: behavior cloning of gold action sequences,
            then 60 RL steps. Takes about a quarter of an hour on two cores, and once four minutes more for the gold sequences;
            success on valid_unseen rises from about 40 % to about 70 % (docs/results.md)
    smoke   everything tiny, end to end, for tests
"""

from ml_collections import ConfigDict

from epo_jax.common.errors import UserError, nearest
from epo_jax.settings.columns import follow_method
from epo_jax.settings.config import base_config

PRESETS = "paper", "laptop", "smoke"


def get_config(preset: str = "paper") -> ConfigDict:
    config = base_config("scienceworld")
    config.model.update(
        path="Qwen/Qwen2.5-7B-Instruct",
        d_model=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        d_ff=18944,
        vocab_size=152064,
        tie_embeddings=False,
    )
    if preset == "laptop":
        _laptop(config)
    elif preset == "smoke":
        _laptop(config)
        _smoke(config)
    elif preset == "paper":
        _paper(config)
    else:
        near = nearest(preset, PRESETS)
        raise UserError(f"scienceworld has no preset {preset!r}{near}; choose one of {', '.join(map(repr, PRESETS))}.")
    return config


def _paper(config: ConfigDict) -> None:
    follow_method(config)
    config.algo.update(mini_batches_by="turn", critic_lr=0.0, critic_schedule="constant")


def _laptop(config: ConfigDict) -> None:
    config.env.update(
        workers=2,
        max_turns=12,
        hints="none",
        tasks=(
            "find-animal",
            "find-living-thing",
            "find-non-living-thing",
            "lifespan-longest-lived",
            "lifespan-shortest-lived",
        ),
        valid_seen_variations=10,
        valid_unseen_variations=24,
    )
    config.agent.update(style="bare", context="chat", response_tokens=14, max_tokens=384)
    config.model.update(
        path="",
        d_model=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        d_ff=256,
        vocab_size=1024,
        rope_theta=10_000.0,
        tie_embeddings=True,
        dtype="float32",
        remat="none",
    )
    # Few updates, on purpose: after three times as many, RL has nothing left to improve.
    config.warm_start.update(episodes=600, steps=100, batch_tokens=1920, lr=3e-3, prompt_weight=0.3, optimizer="muon")
    # With two resets ahead in each of two lanes: 32 live episodes, 16 in each of two JVMs.
    config.rollout.update(groups=16, group_size=8, slots=28)
    config.algo.update(mini_batches=8, micro_batch_rows=5, kl_coef=0.0, aggregation="seq-mean-token-mean")
    config.epo.update(lam=0.005, alpha=5.0, kappa_r=1.5, scope="trajectory")
    config.optim.update(lr=2e-4, b2=0.98, warmup_ratio=0.03)
    config.train.update(steps=60, rows_tokens=384, rows_policy_tokens=128)
    config.eval.update(every=30)
    config.checkpoint.update(every=30)


def _smoke(config: ConfigDict) -> None:
    config.env.update(
        workers=1,
        max_turns=5,
        tasks=("lifespan-longest-lived",),
        train_variations=4,
        valid_seen_variations=2,
        valid_unseen_variations=2,
    )
    config.agent.update(response_tokens=12, max_tokens=768)
    config.model.update(d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, d_ff=64, vocab_size=512)
    config.warm_start.update(episodes=2, steps=4, batch_tokens=1024)
    config.rollout.update(groups=2, group_size=2, slots=4, lanes=2)
    config.algo.update(mini_batches=1, micro_batch_rows=2)
    config.train.update(steps=2, rows_tokens=768, rows_policy_tokens=192)
    config.eval.update(every=0)
    config.checkpoint.update(every=1)
