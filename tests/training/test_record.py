"""The row of an RL step."""

import pytest

from epo_jax.rollout.scheduler import RolloutStats
from epo_jax.settings.config import base_config
from epo_jax.training.record import step_row
from tests import tiny


@pytest.mark.parametrize(
    ("method", "edges"),
    [("grpo+epo", (0.2, 2.4)), ("grpo+epo_two_sided", (1.0, 3.0)), ("ppo+epo_paper", (0.0, 4.0)), ("grpo", (0.2, 2.4))],
)
def test_the_corridor_is_the_one_that_the_method_trains_with(method, edges):
    """Around a mean past entropy of 2 nats; two of the methods set its edges, whatever the config has."""
    config = base_config()
    config.algo.name = method
    config.epo.update(kappa_l=0.1, kappa_r=1.2)
    metrics = {"corridor_center": 2.0, "entropy": 1.0, "behaviour_entropy": 1.0}
    row, first = (step_row(config, step, [tiny.episodes(0)], 0, RolloutStats(seconds=1.0), metrics) for step in (3, 0))
    assert (row["corridor_low"], row["corridor_high"]) == pytest.approx(edges)
    assert first["corridor_low"] is first["corridor_high"] is None
