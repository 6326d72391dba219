"""The paper's comparison as sweeps: base algorithms, EPO and its ablations, EA, and the reference implementation's arithmetic.

    epo-jax sweep sweeps/alfworld --config=ablation:laptop
    epo-jax sweep sweeps/scienceworld --config=ablation:laptop-scienceworld
    epo-jax sweep sweeps/lam --config=ablation:laptop \\
        --config.sweep.arms='("grpo+epo",)' --config.sweep.seeds='(0, 1)' --config.sweep.over.epo.lam='(0.001, 0.01, 0.1)'

Methods that differ only in coefficients (PPO, EPO-Base, EPO and Decay, for example) train in one compiled program.

Presets, on ALFWorld or, with the suffix `-scienceworld`, on ScienceWorld
    paper   (default) the paper's models and steps, five seeds; each run trains LoRA adapters over one shared base. All methods
            have GRPO's 16 tasks x 8 episodes, or with --config.algo.name=ppo and arms of ppo alone, PPO's 128 x 1
    laptop  the laptop preset of alfworld or scienceworld, five seeds; an estimated 16 hours on two cores
    smoke   two methods and two seeds of a tiny model, for tests
"""

from ml_collections import ConfigDict

from epo_jax.common.errors import UserError
from epo_jax.configs import alfworld, scienceworld
from epo_jax.settings.sweep import sweep_section

ARMS = (
    "ppo",
    "ppo+epo_base",
    "ppo+epo",
    "ppo+epo_wo_dw",
    "ppo+epo_decay",
    "ppo+ea",
    "grpo",
    "grpo+epo_base",
    "grpo+epo",
    "gigpo",
    "gigpo+epo",
    "grpo+released",
)


def get_config(preset: str = "paper") -> ConfigDict:
    size, _, env = preset.partition("-")
    env = env or "alfworld"
    if size not in ("paper", "laptop", "smoke") or env not in ("alfworld", "scienceworld"):
        raise UserError(
            f"ablation has no preset {preset!r}; choose one of 'paper', 'laptop', 'smoke', alone for ALFWorld or "
            "with '-scienceworld'."
        )
    config = {"alfworld": alfworld, "scienceworld": scienceworld}[env].get_config(size)
    config.sweep = sweep_section()
    config.sweep.update(arms=ARMS, seeds=(0, 1, 2, 3, 4))
    if size == "paper":
        config.model.lora_rank = 32
        config.algo.critic = "lora"
        config.optim.lr = 2e-5  # adapters need a higher learning rate than full weights
    if size == "smoke":
        config.sweep.update(arms=("grpo+epo_base", "grpo+epo"), seeds=(0, 1))
    return config
