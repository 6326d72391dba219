import jax
import jax.numpy as jnp
import numpy as np

from epo_jax.objectives.value import value_loss


def test_the_larger_error_counts_and_clipped_values_get_no_gradient():
    """Old value 0, clip 0.5: a value of 2 towards a return of 3 is judged at 0.5, and cannot move."""
    value, old, returns = jnp.array([[2.0, 0.2]]), jnp.zeros((1, 2)), jnp.array([[3.0, 1.0]])
    part = value_loss(value, old, returns, 0.5)
    np.testing.assert_allclose(part.loss, [[2.5**2, 0.8**2]], rtol=1e-6)
    np.testing.assert_array_equal(part.clipped, [[1.0, 0.0]])
    slope = jax.grad(lambda v: value_loss(v, old, returns, 0.5).loss.sum())(value)
    np.testing.assert_allclose(slope, [[0.0, -1.6]], rtol=1e-6)
