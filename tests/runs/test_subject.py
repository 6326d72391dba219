"""Titles of figures name what a run is about."""

import pytest

from epo_jax.runs.subject import subject

NEW = {"env.name": "alfworld", "env.max_turns": 19, "model.path": "", "model.num_layers": 3, "model.d_model": 128}


@pytest.mark.parametrize(
    ("config", "processes", "text"),
    [
        (NEW | {"algo.name": "ppo", "seed": 1}, (), "ALFWorld, 19 turns · new model, 3 layers of width 128 · ppo · seed 1"),
        (NEW, [{"parameters": 712_345}], "ALFWorld, 19 turns · new model, 0.71M parameters trained, 3 layers of width 128"),
        ({"env.name": "my.module", "model.path": "Qwen/Qwen3-0.6B", "seed": 0}, (), "my.module · Qwen/Qwen3-0.6B · seed 0"),
        ({"model.path": "/data/models/clone/"}, [{"parameters": 36_123_456}], "clone, 36M parameters trained"),
        (
            {"model.path": "org/model"},
            [{"parameters": 494_000_000}, {"parameters": 3_090_000_000}],
            "org/model, 3.1B parameters trained",
        ),
        ({"model.path": "org/model"}, [{"parameters": 494_000_000}], "org/model, 490M parameters trained"),
        ({}, (), ""),
    ],
)
def test_what_a_run_is_about(config, processes, text):
    assert subject(config, processes) == text
