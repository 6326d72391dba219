"""The paper's preset end to end, in bfloat16 with windows and a pretrained model, on one device and on eight."""

import jax
import numpy as np
import pytest

from epo_jax import main as program
from epo_jax.envs.base import environment
from epo_jax.models import weights
from epo_jax.models.decoder import DecoderConfig, init_params
from epo_jax.runs.metrics import read_rows
from epo_jax.training.initial_policy import expert_demonstrations, own_tokenizer
from tests.settings.test_config import preset

# Sizes alone.
SIZES = {
    "env.train_games": 12, "env.valid_seen_games": 6, "env.valid_unseen_games": 6, "env.max_receptacles": 6, "env.max_turns": 3,
    "env.workers": 1, "agent.response_tokens": 8, "agent.max_tokens": 1024, "rollout.groups": 2, "rollout.group_size": 4,
    "rollout.slots": 8, "rollout.lanes": 1, "rollout.block": 8, "algo.mini_batch_turns": 12, "train.steps": 2,
    "train.rows_tokens": 1024, "train.rows_policy_tokens": 64, "eval.every": 0, "eval.before": False, "checkpoint.every": 2,
    "eval.splits": ("valid_seen",),
}  # fmt: skip


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """The options of a run: sizes, games, and the folder of a small Qwen2 with random weights."""
    data, model = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("model")
    config = preset("alfworld", "paper")
    config.update_from_flattened_dict(SIZES | {"env.data_dir": str(data), "model.vocab_size": 900})
    config.warm_start.update(episodes=4, lost=True)
    env = environment("alfworld")
    env.prepare(config.env.to_dict())
    tokenizer = own_tokenizer(config, expert_demonstrations(config, env.list_tasks("train", config.env.to_dict())))
    tokenizer.save(model)
    qwen2 = DecoderConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 64)
    weights.save_params(model, qwen2, jax.jit(init_params, static_argnums=0)(qwen2, jax.random.key(0)))
    return SIZES | {"env.data_dir": data, "model.path": model}


def test_the_papers_preset_has_one_curve_on_one_device_and_on_eight(sizes, tmp_path):
    """Step 0 plays the same episodes, and its update agrees within a rounding of bfloat16: 2^-8 of each number, or 2e-3 where
    only rounding is left of a mean (entropies are near 5 nats, and there are 190 tokens). In later steps the weights differ by
    rounding, and where a draw then falls on another token that episode goes another way: 5 % of each number."""
    curves = {}
    for name, devices in (("one", {}), ("eight", {"mesh.data": 2, "mesh.fsdp": 4})):
        options = [f"--config.{key}={value}" for key, value in (sizes | devices).items()]
        program.main(["main", "--config=configs/alfworld.py:paper", f"--workdir={tmp_path / name}", *options])
        curves[name] = read_rows(tmp_path / name / "metrics.jsonl")
        assert [row["step"] for row in read_rows(tmp_path / name / "eval.jsonl")] == [2]
    for (step, one), eight in zip(enumerate(curves["one"]), curves["eight"], strict=True):
        assert one.keys() == eight.keys() and one["grad_norm"] > 0.1 and one["skipped_updates"] == 0
        if step == 0:
            assert all(one[key] == eight[key] for key in ("tokens", "policy_tokens", "prompt_tokens", "turns"))
        for key, value in one.items():
            if isinstance(value, float) and "second" not in key and "mfu" not in key:
                np.testing.assert_allclose(eight[key], value, rtol=2**-8 if step == 0 else 0.05, atol=2e-3, err_msg=key)
