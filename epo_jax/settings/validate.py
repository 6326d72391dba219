"""What a config is refused for, in one sentence that names the key and the fix."""

import math

from ml_collections import ConfigDict

from epo_jax.common.errors import UserError, nearest
from epo_jax.settings.config import flatten
from epo_jax.settings.table import LORA_TARGETS, SETTINGS

# Base algorithms that compare the episodes of a task with each other, which needs a group of two or more.
GROUP_ALGORITHMS = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "gigpo", "dapo", "gspo")

SPLITS = ("train", "valid_seen", "valid_unseen")


def validate(config: ConfigDict) -> None:
    """Raises UserError for a value that no run could use."""
    values = flatten(config)
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{key}={value} is not a finite number.")
    for setting in SETTINGS:
        value = values.get(setting.key)
        if value is None:
            continue
        if setting.choices and value not in setting.choices:
            listed = ", ".join(map(repr, setting.choices))
            near = nearest(value, setting.choices)
            raise UserError(f"config.{setting.key}={value!r} is not known; choose one of {listed}{near}.")
        if setting.rule and not setting.rule.holds(value):
            raise UserError(f"config.{setting.key}={value} must be {setting.rule.words}.")
    _validate_pairs(config)


def _validate_pairs(config: ConfigDict) -> None:
    """The rules that hold between keys."""
    epo, model, algo, rollout, agent = config.epo, config.model, config.algo, config.rollout, config.agent
    if epo.kappa_l > epo.kappa_r:
        raise UserError(f"config.epo.kappa_l={epo.kappa_l} must not exceed config.epo.kappa_r={epo.kappa_r}.")
    if config.control.cov_low >= config.control.cov_high:
        raise UserError(
            f"config.control.cov_low={config.control.cov_low} must be below config.control.cov_high={config.control.cov_high}."
        )
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"config.model.num_heads={model.num_heads} must be a multiple of "
            f"config.model.num_kv_heads={model.num_kv_heads}."
        )
    if model.head_dim % 2:
        raise UserError(f"config.model.head_dim={model.head_dim} must be even, as rotary positions turn pairs.")
    if algo.name.split("+")[0] in GROUP_ALGORITHMS and rollout.group_size < 2:
        raise UserError(
            f"config.rollout.group_size={rollout.group_size} must be at least 2 for config.algo.name={algo.name!r}, "
            "which compares episodes of one task."
        )
    if algo.mini_batch_turns % algo.micro_batch_turns:
        raise UserError(
            f"config.algo.mini_batch_turns={algo.mini_batch_turns} must be a multiple of "
            f"config.algo.micro_batch_turns={algo.micro_batch_turns}."
        )
    if algo.kl_kind == "full" and algo.kl_place == "reward":
        raise UserError(
            "config.algo.kl_kind='full' belongs in the loss; for config.algo.kl_place='reward' choose an estimate "
            "from the sampled token: 'k1', 'abs', 'k2' or 'k3'."
        )
    if algo.kl_controller == "adaptive" and not algo.kl_coef:
        raise UserError(
            "config.algo.kl_coef=0 must be positive for config.algo.kl_controller='adaptive', which multiplies it."
        )
    episodes = rollout.groups * rollout.group_size
    if rollout.slots > episodes:
        raise UserError(
            f"config.rollout.slots={rollout.slots} must not exceed the {episodes} episodes of a step "
            "(config.rollout.groups x config.rollout.group_size)."
        )
    if agent.response_tokens >= agent.max_tokens:
        raise UserError(
            f"config.agent.response_tokens={agent.response_tokens} must be below "
            f"config.agent.max_tokens={agent.max_tokens}."
        )
    if config.train.rows_tokens < agent.max_tokens:
        raise UserError(
            f"config.train.rows_tokens={config.train.rows_tokens} must be at least "
            f"config.agent.max_tokens={agent.max_tokens}, so that an episode fits in a row."
        )
    if config.train.rows_policy_tokens < agent.response_tokens:
        raise UserError(
            f"config.train.rows_policy_tokens={config.train.rows_policy_tokens} must be at least "
            f"config.agent.response_tokens={agent.response_tokens}, so that a turn fits in a row."
        )
    if algo.mini_batches > episodes:
        raise UserError(
            f"config.algo.mini_batches={algo.mini_batches} must not exceed the {episodes} episodes of a step."
        )
    if config.warm_start.copies and config.env.name != "alfworld":
        raise UserError(f"config.warm_start.copies={config.warm_start.copies} must be 0: only ALFWorld's experts are renamed.")
    if config.warm_start.episodes and not config.warm_start.steps:
        raise UserError("config.warm_start.steps must be positive when config.warm_start.episodes is.")
    for target in model.lora_targets:
        if target not in LORA_TARGETS:
            raise UserError(f"config.model.lora_targets names {target!r}; choose from {', '.join(map(repr, LORA_TARGETS))}.")
    if model.lora_rank and not model.lora_targets:
        raise UserError("config.model.lora_targets is empty; name a projection, or set config.model.lora_rank=0.")
    if algo.critic == "lora" and not model.lora_rank:
        raise UserError("config.algo.critic='lora' needs the policy's frozen base: set config.model.lora_rank, or choose 'own'.")
    if rollout.devices > 1 and any(size > 1 for size in config.mesh.values()):
        raise UserError(
            f"config.rollout.devices={rollout.devices} must be 1 with a mesh of several devices (config.mesh), which share the "
            "slots too."
        )
    for split in config.eval.splits:
        if split not in SPLITS:
            near = nearest(split, SPLITS)
            raise UserError(f"config.eval.splits names {split!r}{near}; choose from {', '.join(map(repr, SPLITS))}.")
