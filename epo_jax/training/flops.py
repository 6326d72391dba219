"""Model FLOPs of rollout and update, as a share of the peak.

Counted are the operations that the method needs (arXiv 2204.02311, app. B): matrix products at two operations a multiplication,
and attention over the tokens that a token attends to. Not counted are operations on padding, on masked scores, or of
rematerialization. Counts are operations; rates are operations per second.
"""

from collections import Counter
from collections.abc import Iterable

import jax

from epo_jax.models.decoder import DecoderConfig
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.training.state import LearnerConfig

# Peak of dense bfloat16 arithmetic, in operations per second of one JAX device, by the start of its `device_kind`: data sheets of
# the makers, without sparsity.
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def peak(device_kind: str) -> float | None:
    """The peak of a device in operations per second, if it is known."""
    known = [name for name in PEAK if device_kind.startswith(name) and not device_kind[len(name) :][:1].isalnum()]
    return PEAK[max(known, key=len)] if known else None


def context_flops(model: DecoderConfig, contexts: Iterable[int]) -> tuple[float, float, float]:
    """(weights, adapters, attention): operations of the layers in a forward pass.

    `contexts` are lengths in tokens. `weights` are products with the weights of the base, `adapters` products with adapters.
    """
    sizes = model.projection_sizes()
    weights = sum(rows * columns for rows, columns in sizes.values())
    adapters = sum(model.lora.rank * sum(sizes[name]) for name in model.lora.targets) if model.lora else 0
    contexts = list(contexts)
    layers = Counter(model.layer_windows())
    seen = sum(count * _seen(length, window) for window, count in layers.items() for length in contexts)
    tokens = 2.0 * model.num_layers * sum(contexts)
    # Scores and the weighted sum of values: one product of `head_dim` each, for every head.
    return tokens * weights, tokens * adapters, 2.0 * 2.0 * model.num_heads * model.head_dim * seen


def _seen(length: int, window: int | None) -> int:
    """Pairs of a token and one that it attends to, itself included."""
    inside = min(length, window or length)
    return inside * (inside + 1) // 2 + (length - inside) * inside


def head_flops(model: DecoderConfig, policy_tokens: int) -> float:
    """Operations of the output head in a forward pass."""
    return 2.0 * model.d_model * model.vocab_size * policy_tokens


def sampling_flops(model: DecoderConfig, contexts: Iterable[int], policy_tokens: int) -> float:
    """Operations to prefill and sample contexts with `policy_tokens` sampled tokens."""
    return sum(context_flops(model, contexts)) + head_flops(model, policy_tokens)


def update_flops(config: LearnerConfig, contexts: Iterable[int], policy_tokens: int) -> float:
    """Operations of all updates of an RL step on these contexts.

    They are the forward and backward pass of every epoch, and the passes before them of the reference policy, the critic and the
    policy itself, if there are any.
    """
    model, objective = config.model, config.objective
    contexts = list(contexts)
    weights, adapters, attention = context_flops(model, contexts)
    head = head_flops(model, policy_tokens)
    # Backward, a product has a gradient for either factor; frozen weights need none.
    trained = 3.0 if model.lora is None else 2.0
    policy = trained * (weights + head) + 3.0 * (adapters + attention)
    total = config.epochs * policy
    reference = weights + attention + head
    if config.reference:
        total += config.epochs * reference if objective.kl == "full" else reference
    if objective.own_old_log_prob or objective.entropy_top_p is not None:
        total += weights + adapters + attention + head
    if config.critic_optim:
        forward = weights + attention + (0.0 if config.critic == "own" else adapters)
        backward = {"own": 2.0 * forward, "lora": weights + 2.0 * (adapters + attention), "trunk": 0.0}
        total += forward + config.epochs * (forward + backward[config.critic])
    return total


def rates(
    config: LearnerConfig,
    sampled: list[Trajectory],
    trained: list[Trajectory],
    rollout_seconds: float,
    update_seconds: float,
    devices: int,
) -> dict[str, float]:
    """The fields of metrics.jsonl for the use of `devices` devices.

    They are the operations per second of the rollout of `sampled` and of the update on `trained`, all devices together, and their
    shares of the peak if it is known.
    """
    did = {
        "rollout": sampling_flops(config.model, *_tokens(sampled)) / rollout_seconds,
        "update": update_flops(config, *_tokens(trained)) / update_seconds,
    }
    most = peak(jax.devices()[0].device_kind)
    row = {f"{name}_flops_per_second": rate for name, rate in did.items()}
    return row | ({f"{name}_mfu": rate / (most * devices) for name, rate in did.items()} if most else {})


def _tokens(trajectories: list[Trajectory]) -> tuple[list[int], int]:
    contexts = [end - start for t in trajectories for start, end in t.contexts]
    return contexts, sum(t.num_policy_tokens for t in trajectories)
