"""A mini-batch of rows, a micro-batch at a time: what a function gives at every row, and the gradient of a loss.

The loops stop at the last live row, so shapes never change and padding costs nothing. How the rows are split changes memory, not
the result.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from epo_jax.models.decoder import Params
from epo_jax.parallel import mesh


def in_micro_batches(x: Array, micro_rows: int) -> Array:
    """[R, ...] as [R / micro_rows, micro_rows, ...], micro-batches sharded over rows."""
    return mesh.constrain(x.reshape(-1, micro_rows, *x.shape[1:]), None, "rows")


def over_micro_batches(fn: Callable, rows, live: Int[Array, ""], micro_rows: int, start):
    """Folds `carry = fn(carry, micro_batch, index)` over the live rows, `micro_rows` at a time."""
    rows = jax.tree.map(lambda x: in_micro_batches(x, micro_rows), rows)

    def body(i, carry):
        return fn(carry, jax.tree.map(lambda x: x[i], rows), i)

    return jax.lax.fori_loop(0, (live + micro_rows - 1) // micro_rows, body, start)


def in_rows(fn: Callable, inputs, live: Int[Array, ""], micro_rows: int):
    """`fn(micro_batch) -> [rows, P]`, or a pytree of them, over the live rows of a mini-batch: [R, P], 0 in the other rows."""

    def body(out, micro, i):
        return jax.tree.map(lambda whole, part: whole.at[i].set(part), out, fn(micro))

    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[:micro_rows], inputs))
    zeros = jnp.zeros(inputs.label.shape, jnp.float32)
    start = jax.tree.map(lambda _: in_micro_batches(zeros, micro_rows), shapes)
    out = over_micro_batches(body, inputs, live, micro_rows, start)
    return jax.tree.map(lambda x: x.reshape(inputs.label.shape), out)


def summed_gradients(loss: Callable, params: Params, rows, live: Int[Array, ""], micro_rows: int, axes: PyTree[mesh.Axes]):
    """(gradient, sums, maxima) of `loss(params, micro_batch) -> (loss, (sums, maxima))` over a mini-batch: gradients and metric
    sums are added up, of metric maxima the largest is kept (-inf where there is no row).

    `axes` are the logical axes of the parameters, by which the gradient is sharded.
    """
    gradient = jax.grad(loss, has_aux=True)

    def found(params, micro):
        summand, (sums, maxima) = gradient(params, micro)
        return (mesh.as_stored(summand, axes), sums), maxima

    shapes = jax.eval_shape(found, params, jax.tree.map(lambda x: x[:micro_rows], rows))
    (zeros, sums), maxima = (
        jax.tree.map(lambda s, value=value: jnp.full(s.shape, value, s.dtype), part)
        for part, value in zip(shapes, (0.0, -jnp.inf), strict=True)
    )

    def body(carry, micro, _):
        added, largest = found(params, micro)
        return jax.tree.map(jnp.add, carry[0], added), jax.tree.map(jnp.maximum, carry[1], largest)

    start = (mesh.as_stored(zeros, axes), sums), maxima
    (summed, sums), maxima = over_micro_batches(body, rows, live, micro_rows, start)
    return summed, sums, maxima


def gradient_by_slopes(
    statistics: Callable, loss: Callable, params: Params, rows, live: Int[Array, ""], micro_rows: int, axes: PyTree[mesh.Axes]
):
    """`summed_gradients` of a loss that depends on several rows at once, such as the mean over an episode whose turns are in many
    rows: every split into micro-batches has the same result.

    The chain rule in two passes. First `statistics(params, inputs)` of all rows, and the slope of `loss(statistics, rows)` by
    each of them; then the gradient of each micro-batch's statistics times their slopes. It costs a forward pass more.
    """
    whole = in_rows(functools.partial(statistics, params), rows.batch, live, micro_rows)
    slopes, (sums, maxima) = jax.grad(loss, has_aux=True)(whole, rows)

    def sloped(params, micro):
        rows, slopes = micro
        return optax.tree.vdot(slopes, statistics(params, rows)), ({}, {})

    gradient, _, _ = summed_gradients(sloped, params, (rows.batch, slopes), live, micro_rows, axes)
    return gradient, sums, maxima
