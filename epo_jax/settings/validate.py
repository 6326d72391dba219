"""What a config is refused for: a sentence that names the key and the fix."""

import math

from ml_collections import ConfigDict

from epo_jax.common.errors import UserError, nearest
from epo_jax.settings.config import flatten
from epo_jax.settings.table import SETTINGS

# Base algorithms that compare the episodes of a task with each other.
GROUP_ALGORITHMS = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "gigpo", "dapo", "gspo")


def validate(config: ConfigDict) -> None:
    """Raises UserError for a value that no run could use, or for values that contradict each other."""
    values = flatten(config)
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{key}={value} is not a finite number.")
    for setting in SETTINGS:
        value = values.get(setting.key)
        if value is None:
            continue
        if setting.choices:
            _refuse_unknown(setting.key, value, setting.choices)
        if setting.rule and not setting.rule.holds(value):
            raise UserError(f"config.{setting.key}={value} must be {setting.rule.words}.")
    _check_model(config)
    _check_objective(config)
    _check_batches(config)
    if config.eval.temperature in config.eval.also_temperatures:
        raise UserError(
            f"config.eval.also_temperatures={config.eval.also_temperatures} contains config.eval.temperature, at which every "
            "split is played already; leave it out there."
        )


def _refuse_unknown(key: str, value: str | tuple[str, ...], choices: tuple[str, ...]) -> None:
    listed = ", ".join(map(repr, choices))
    if isinstance(value, tuple):
        for item in value:
            if item not in choices:
                raise UserError(f"config.{key} names {item!r}{nearest(item, choices)}; choose from {listed}.")
    elif value not in choices:
        raise UserError(f"config.{key}={value!r} is not known{nearest(value, choices)}; choose one of {listed}.")


def _check_model(config: ConfigDict) -> None:
    """The policy, its critic, its warm start and its devices."""
    model, warm_start = config.model, config.warm_start
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"config.model.num_heads={model.num_heads} must be a multiple of config.model.num_kv_heads={model.num_kv_heads}."
        )
    if model.head_dim % 2:
        raise UserError(f"config.model.head_dim={model.head_dim} must be even, as rotary positions turn pairs.")
    if model.lora_rank and not model.lora_targets:
        raise UserError("config.model.lora_targets is empty; name a projection, or set config.model.lora_rank=0.")
    if config.algo.critic == "lora" and not model.lora_rank:
        raise UserError("config.algo.critic='lora' needs the policy's frozen base: set config.model.lora_rank, or choose 'own'.")
    if warm_start.episodes and not warm_start.steps:
        raise UserError("config.warm_start.steps must be positive if config.warm_start.episodes is.")
    if config.rollout.devices > 1 and any(size > 1 for size in config.mesh.values()):
        raise UserError(
            f"config.rollout.devices={config.rollout.devices} must be 1 with a mesh of several devices (config.mesh), which "
            "share the slots too."
        )


def _check_objective(config: ConfigDict) -> None:
    """Choices and coefficients of the objective."""
    algo, epo, control = config.algo, config.epo, config.control
    if epo.kappa_l > epo.kappa_r:
        raise UserError(f"config.epo.kappa_l={epo.kappa_l} must not exceed config.epo.kappa_r={epo.kappa_r}.")
    if control.cov_low >= control.cov_high:
        raise UserError(f"config.control.cov_low={control.cov_low} must be below config.control.cov_high={control.cov_high}.")
    if algo.kl_kind == "full" and algo.kl_place == "reward":
        raise UserError(
            "config.algo.kl_kind='full' belongs in the loss; for config.algo.kl_place='reward' choose an estimate "
            "from the sampled token: 'k1', 'abs', 'k2' or 'k3'."
        )
    if algo.kl_controller == "adaptive" and not algo.kl_coef:
        raise UserError("config.algo.kl_coef=0 must be positive for config.algo.kl_controller='adaptive', which multiplies it.")
    if algo.name.split("+")[0] in GROUP_ALGORITHMS and config.rollout.group_size < 2:
        raise UserError(
            f"config.rollout.group_size={config.rollout.group_size} must be at least 2 for config.algo.name={algo.name!r}, "
            "which compares episodes of one task."
        )


def _check_batches(config: ConfigDict) -> None:
    """What must fit into what: episodes, contexts, rows and mini-batches."""
    agent, algo, rollout, train = config.agent, config.algo, config.rollout, config.train
    episodes = rollout.groups * rollout.group_size
    if rollout.slots > episodes:
        raise UserError(
            f"config.rollout.slots={rollout.slots} must not exceed the {episodes} episodes of a step "
            "(config.rollout.groups x config.rollout.group_size)."
        )
    if algo.mini_batches_by == "episode" and algo.mini_batches > episodes:
        raise UserError(f"config.algo.mini_batches={algo.mini_batches} must not exceed the {episodes} episodes of a step.")
    if agent.response_tokens >= agent.max_tokens:
        raise UserError(
            f"config.agent.response_tokens={agent.response_tokens} must be below config.agent.max_tokens={agent.max_tokens}."
        )
    if train.rows_tokens < agent.max_tokens:
        raise UserError(
            f"config.train.rows_tokens={train.rows_tokens} must be at least config.agent.max_tokens={agent.max_tokens}, so that "
            "an episode fits in a row."
        )
    if train.rows_policy_tokens < agent.response_tokens:
        raise UserError(
            f"config.train.rows_policy_tokens={train.rows_policy_tokens} must be at least "
            f"config.agent.response_tokens={agent.response_tokens}, so that a turn fits in a row."
        )
