"""ALFWorld: household tasks of six types.

    epo-jax train runs/alfworld --config=alfworld:laptop

Presets
    demo    `laptop` with the policy of policies/initial in place of behavior cloning, and 30 RL steps: three minutes on two cores
    paper   (default) Qwen2.5-3B-Instruct with the paper's settings: 150 RL steps of 16 games x 8 episodes of up to 50 turns in
            mini-batches of 256 turns; with --config.algo.name=ppo+epo and other variants of ppo, 128 games x 1 episode
    laptop  a model of about a million parameters from scratch: behavior cloning of an expert, then 150 RL steps. Takes about a
            quarter of an hour on two cores; success on valid_unseen rises from about 25 % to about 90 % (docs/results.md)
    smoke   everything tiny, end to end, for tests
"""

from pathlib import Path

from ml_collections import ConfigDict

from epo_jax.common.errors import UserError, nearest
from epo_jax.settings.columns import follow_method
from epo_jax.settings.config import base_config

PRESETS = "paper", "laptop", "demo", "smoke"
# Policies that come with the package: what `demo` begins with, and what it results in. README.md there has the commands.
POLICY = Path(__file__).with_name("policies") / "initial"
AGENT = Path(__file__).with_name("policies") / "agent"


def get_config(preset: str = "paper") -> ConfigDict:
    config = base_config("alfworld")
    if preset == "laptop":
        _laptop(config)
    elif preset == "demo":
        _laptop(config)
        _demo(config)
    elif preset == "smoke":
        _laptop(config)
        _smoke(config)
    elif preset == "paper":
        _paper(config)
    else:
        near = nearest(preset, PRESETS)
        raise UserError(f"alfworld has no preset {preset!r}{near}; choose one of {', '.join(map(repr, PRESETS))}.")
    return config


def _paper(config: ConfigDict) -> None:
    follow_method(config)
    config.algo.update(mini_batches_by="turn", critic_lr=0.0, critic_schedule="constant")


def _laptop(config: ConfigDict) -> None:
    config.env.update(max_turns=19, train_games=1500, valid_seen_games=60, valid_unseen_games=120, max_receptacles=8)
    config.env.update(hesitation=0.9, mistakes=0.15)
    config.env.hints = "none"
    config.agent.update(style="bare", context="chat", response_tokens=12, max_tokens=384)
    config.model.update(
        path="",
        d_model=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        d_ff=256,
        vocab_size=1280,
        rope_theta=10_000.0,
        dtype="float32",
        remat="none",
    )
    config.warm_start.update(episodes=1500, copies=7, steps=3000, batch_tokens=1920, lr=3e-3, prompt_weight=0.3)
    config.warm_start.optimizer = "muon"
    config.rollout.update(groups=16, group_size=8, slots=128, lanes=8)
    config.algo.update(mini_batches=8, micro_batch_rows=2, kl_coef=0.0, aggregation="seq-mean-token-mean")
    # The corridor applies to the mean entropy of an episode. Applied to each token, it would lower the entropy of the few
    # tokens that decide between two actions, which is always far above the mean, and so end exploration. The paper's
    # alpha would not keep entropy in the corridor: above it, entropy falls only if alpha * beta exceeds 1 (docs/method.md).
    config.epo.update(lam=0.005, alpha=5.0, kappa_r=1.5, scope="trajectory")
    config.optim.update(lr=2e-4, b2=0.98, warmup_ratio=0.03)
    config.train.update(steps=150, rows_tokens=384, rows_policy_tokens=160)
    config.eval.update(every=75)
    config.checkpoint.update(every=75)


def _demo(config: ConfigDict) -> None:
    config.env.update(train_games=480, valid_seen_games=1, valid_unseen_games=120)
    config.model.path = str(POLICY)
    config.warm_start.update(episodes=0)
    config.train.update(steps=30)
    config.eval.update(every=10, splits=("valid_unseen",))
    config.checkpoint.update(every=10)


def _smoke(config: ConfigDict) -> None:
    config.env.update(max_turns=4, train_games=12, valid_seen_games=6, valid_unseen_games=6, max_receptacles=6)
    config.agent.update(response_tokens=12, max_tokens=384)
    config.model.update(d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, d_ff=64, vocab_size=512)
    config.warm_start.update(episodes=6, copies=1, steps=4, batch_tokens=1024)
    config.rollout.update(groups=2, group_size=2, slots=4, lanes=2)
    config.algo.update(mini_batches=2, micro_batch_rows=2)
    config.train.update(steps=2, rows_tokens=384, rows_policy_tokens=192)
    config.eval.update(every=0)
    config.checkpoint.update(every=1)
