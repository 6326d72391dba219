"""What the corridor does to a softmax bandit, against the closed form: writes docs/figures/bandit.png.

    python benchmarks/bandit.py

A policy over V actions maximizes r . p + lam * (H - beta * alpha * P(H)) by gradient ascent on its logits. Inside the
corridor P = 0 and the optimum is the Boltzmann policy p ~ exp(r / lam). Below it the hinge adds lam * beta * alpha * H,
so the temperature becomes lam * (1 + beta * alpha); above it, lam * (1 - beta * alpha). If the optimum of neither side
is on that side, the policy settles on the edge between them. The indicator changes nothing: its gradient is zero.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from epo_jax.objectives.batch import NO_ARRAYS, Old, Rows, Weights
from epo_jax.objectives.controls import epo_term
from epo_jax.objectives.head import log_prob_entropy_from_logits
from epo_jax.objectives.spec import Hyper, ObjectiveConfig, Smoothing

ARMS = 8
CENTER = 1.2  # nats: mean of the past entropies
BETA = 1.5
COLLAPSE = Hyper(lam=0.25, alpha=1.0, kappa_l=0.8, kappa_r=1.2)  # with a reward that pulls the entropy down
EXPLOSION = Hyper(lam=0.25, alpha=1.0, kappa_l=0.8, kappa_r=1.2)  # without: the bonus pushes it up
REWARD = jnp.zeros(ARMS).at[0].set(1.0)


def boltzmann_entropy(reward: Float[Array, " V"], temperature: float) -> Float[Array, ""]:
    """Entropy (nats) of the policy that maximizes r . p + temperature * H."""
    return log_prob_entropy_from_logits(reward, jnp.zeros((), jnp.int32), temperature)[1]


@functools.partial(jax.jit, static_argnames=("penalty", "steps"))
def entropies(
    logits: Float[Array, " V"],
    reward: Float[Array, " V"],
    hyper: Hyper,
    penalty: str,
    steps: int = 10_000,
    rate: float = 0.1,
) -> Float[Array, " K"]:
    """Entropy of the policy before each of `steps` gradient steps."""
    one = jnp.ones((1, 1))
    zero = jnp.zeros((1, 1), jnp.int32)
    batch = NO_ARRAYS._replace(trajectory=zero, turn=zero)
    rows = Rows(batch, Old(one, one, one, one, one, one, one), Weights(one, one, one, one, one))
    smoothing = Smoothing(jnp.array([CENTER]), jnp.ones(1), jnp.float32(BETA), jnp.asarray(hyper.lam), jnp.zeros(()))
    objective = ObjectiveConfig(penalty=penalty)

    def loss(logits):
        entropy = log_prob_entropy_from_logits(logits, jnp.zeros((), jnp.int32))[1]
        term, _ = epo_term(entropy.reshape(1, 1), rows, smoothing, hyper, objective)
        return term - (jax.nn.softmax(logits) * reward).sum(), entropy

    def step(logits, _):
        gradient, entropy = jax.grad(loss, has_aux=True)(logits)
        return logits - rate * gradient, entropy

    return jax.lax.scan(step, logits, length=steps)[1]


def main(out: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    start = jnp.linspace(1.0, 0.0, ARMS)
    panels = (
        ("A reward pulls the entropy down", REWARD, COLLAPSE, boltzmann_entropy(REWARD, COLLAPSE.lam)),
        ("No reward: the bonus pushes it up", jnp.zeros(ARMS), EXPLOSION, jnp.log(ARMS)),
    )
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, constrained_layout=True)
    for axis, (title, reward, hyper, free) in zip(axes, panels, strict=True):
        axis.axhspan(hyper.kappa_l * CENTER, hyper.kappa_r * CENTER, color="0.9", label="corridor")
        for penalty in ("hinge", "indicator"):
            path = entropies(start, reward, hyper, penalty)
            axis.plot(jnp.arange(1, path.size + 1), path, label=penalty)
        axis.axhline(free, color="k", lw=0.8, ls=":", label="closed form, bonus alone")
        axis.set(title=title, xlabel="gradient step", xscale="log")
    axes[0].set_ylabel("entropy (nats)")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 0.06))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(pathlib.Path("docs/figures/bandit.png"))
