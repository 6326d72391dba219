"""A sweep over the toy game, small enough for tests, and a single run of it; see `configs/ablation.py` for real sweeps."""

from epo_jax.settings.config import base_config
from epo_jax.settings.sweep import sweep_section


def get_config(preset: str = ""):
    config = base_config("toy")
    config.env.update(workers=1, max_turns=2)
    config.agent.update(style="bare", context="chat", response_tokens=5, max_tokens=64)
    config.model.update(path="", d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32, vocab_size=300)
    config.model.update(dtype="float32", remat="none")
    config.warm_start.update(episodes=30, steps=150, batch_tokens=1024, lr=1e-2)
    config.rollout.update(groups=4, group_size=4, slots=8, lanes=2)
    config.algo.update(mini_batches=2, micro_batch_rows=2, kl_coef=0.0)
    config.epo.update(lam=0.01, alpha=2.0)
    config.optim.update(lr=3e-3)
    config.train.update(steps=3, rows_tokens=64, rows_policy_tokens=16)
    config.eval.update(every=2, splits=("valid_seen",))
    config.checkpoint.update(every=1, keep=4)
    config.sweep = sweep_section()
    if preset.startswith("lora"):
        config.model.update(lora_rank=2)
        config.train.update(steps=2)
        config.eval.update(every=0, before=False)
    if preset.endswith("single"):
        del config.sweep
    return config
