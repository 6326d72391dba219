"""The optimizer, and an update that is skipped on empty batches and non-finite gradients."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from epo_jax.models.decoder import Params
from epo_jax.settings.table import DEFAULTS


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW under a linear warm-up and a cosine that ends at `floor_ratio * lr`.

    The schedule counts updates, `updates` in the whole run, or RL steps (`schedule="step"`, `updates` of them), in which case the
    optimizer has the rate `lr` and the caller scales it by `step_rate`. With "constant" the rate is `lr` throughout.

    With `muon`, updates of the layers' matrices are orthogonalised (Muon, https://kellerjordan.github.io/posts/muon) and scaled
    to the size of Adam's; all else has Adam with Nesterov's momentum.
    """

    lr: float
    updates: int
    warmup_ratio: float = DEFAULTS["optim.warmup_ratio"]
    floor_ratio: float = DEFAULTS["optim.floor_ratio"]
    weight_decay: float = DEFAULTS["optim.weight_decay"]
    clip_norm: float = DEFAULTS["optim.clip_norm"]
    b1: float = DEFAULTS["optim.b1"]
    b2: float = DEFAULTS["optim.b2"]
    muon: bool = False
    schedule: Literal["update", "step", "constant"] = "update"


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """The optimizer that a config describes."""
    rate = warmup_cosine(config, config.lr, _first(config)) if config.schedule == "update" else config.lr
    if config.muon:
        update = optax.contrib.muon(
            rate,
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
    else:
        update = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    return optax.chain(_clip(config.clip_norm), update)


def like_parameters(
    config: OptimConfig, opt_state: optax.OptState, of_params: PyTree, of_other: Callable[[Array], Any]
) -> PyTree:
    """A tree like the optimizer's state that follows the parameters.

    Args:
        of_params: a tree like the parameters, whose entries take the places of their moments.
        of_other: gives what takes the place of any other array of the state, such as the number of updates.
    """

    def of(moment, of_param):  # a transformation of some parameters has masks in place of the others' moments
        return moment if isinstance(moment, optax.MaskedNode) else of_param

    return optax.tree_utils.tree_map_params(
        make_optimizer(config), of, opt_state, of_params,
        transform_non_params=of_other, is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )  # fmt: skip


def _clip(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as a product: XLA fuses it into the moments, where of a quotient it makes a second gradient."""
    return optax.stateless(lambda gradient, _: optax.tree.scale(jnp.minimum(1.0, limit / optax.tree.norm(gradient)), gradient))


def _warmup(config: OptimConfig) -> int:
    return int(config.warmup_ratio * config.updates)


def _first(config: OptimConfig) -> float:
    """The first rate of the warm-up, which its second is twice as high as."""
    return config.lr / (_warmup(config) + 1)


def step_rate(config: OptimConfig, step: Int[Array, ""]) -> Float[Array, ""] | float:
    """What scales the rate at RL step `step`: 1, unless the schedule counts RL steps."""
    return warmup_cosine(config, 1.0, _first(config) / config.lr)(step) if config.schedule == "step" else 1.0


def warmup_cosine(config: OptimConfig, peak: float, start: float) -> optax.Schedule:
    """A rate that rises from `start` to `peak` and falls along a cosine to `floor_ratio * peak`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=start,
        peak_value=peak,
        warmup_steps=_warmup(config),
        decay_steps=max(config.updates, _warmup(config) + 1),
        end_value=config.floor_ratio * peak,
    )


def _matrices(params: Params):
    """Where Muon finds the matrices of stacked layers [L, in, out]; biases, norms and embeddings are Adam's."""
    stacked = optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
    return jax.tree.map(lambda x: stacked if x.ndim == 3 else None, params)


def guarded_update(
    config: OptimConfig,
    gradient: Params,
    opt_state: optax.OptState,
    params: Params,
    lr: Float[Array, ""] | float,
    tokens: Float[Array, ""],
) -> tuple[Params, optax.OptState, Float[Array, ""], Float[Array, ""]]:
    """(params, opt_state, norm of the gradient, skipped) after an update on `tokens` policy tokens, times `lr`.

    Without tokens, or where the norm is not finite, nothing changes; `skipped` is 1 in the second case.
    """
    norm = optax.tree.norm(gradient)
    updates, next_state = make_optimizer(config).update(gradient, opt_state, params)
    updated = optax.apply_updates(params, optax.tree.scale(lr, updates)), next_state
    finite = jnp.isfinite(norm)
    made = finite & (tokens > 0)
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(made, new, old), updated, (params, opt_state))
    return params, opt_state, norm, jnp.where(tokens > 0, 1.0 - finite, 0.0)


def stuck(metrics: Mapping[str, Float[Array, ""] | float]) -> Bool[Array, ""] | bool:
    """Whether an RL step had updates to make and none of them a finite gradient."""
    return (metrics["updates"] > 0) & (metrics["skipped_updates"] >= metrics["updates"])
