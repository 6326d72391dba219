"""The dry run: what it prints is what the run would have, and nothing is loaded or written."""

import math

import jax
import pytest

from epo_jax import main as program
from epo_jax import sweep
from epo_jax.configs import alfworld
from epo_jax.models import hub
from epo_jax.models.decoder import init_params
from epo_jax.parallel import mesh
from epo_jax.settings.config import base_config
from epo_jax.training import dry_run, flops, run
from epo_jax.training.from_config import learner_config, objective_and_hyper
from epo_jax.training.state import abstract_state_on, init_state
from tests.toy_sweep import get_config


def learner_of(config):
    return learner_config(config, dry_run.sizes(config)[0], objective_and_hyper(config)[0])


@pytest.mark.parametrize(("main", "preset"), [(program, "single"), (sweep, "")])
def test_nothing_is_loaded_or_written(main, preset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "list_tasks", lambda config: pytest.fail("made games"))
    folder = tmp_path / "run"
    main.main(["x", str(folder), f"--config=tests/toy_sweep.py:{preset}", "--dry_run"])
    told = capsys.readouterr().out
    learner = learner_of(get_config("single"))
    params = init_params(learner.model, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params))
    assert f"model: {count:,} parameters, of which {count:,} are trained" in told
    assert "16 episodes of at most 2 turns; at most 1,024 tokens, 160 of them sampled" in told
    arrays = sum(x.nbytes for x in jax.tree.leaves(init_state(learner, params)))
    assert f"memory of each device: {arrays / 1e6:.1f} MB for the state" in told
    assert ("program 1 of " in told) == (main is sweep) and told.endswith("Nothing was loaded or written.\n")
    assert not folder.exists()


def test_a_model_of_the_hub_is_not_downloaded(monkeypatch):
    monkeypatch.setattr(hub, "resolve", lambda path: pytest.fail("downloaded"))
    model, source = dry_run.sizes(alfworld.get_config("paper"))
    assert (model.d_model, model.num_layers, source) == (2048, 36, "sizes of config.model")


def test_the_sizes_of_a_model_folder_are_its_own(tmp_path):
    config = base_config()
    config.model.path = str(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 96, '
        '"vocab_size": 500}'
    )
    model, source = dry_run.sizes(config)
    assert (model.d_model, model.num_layers, model.vocab_size, source) == (64, 3, 500, f"sizes of {tmp_path}")


def test_the_longest_episodes_fill_their_contexts():
    config = alfworld.get_config("laptop")
    assert dry_run.longest_episodes(config) == ([384] * 128, 128 * 160), "rows_policy_tokens bound a chat"
    config = alfworld.get_config("paper")
    contexts, sampled = dry_run.longest_episodes(config)
    assert (len(contexts), set(contexts), sampled) == (128 * 50, {2560}, 128 * 50 * 512)


def test_the_papers_column_comes_first():
    config = alfworld.get_config("paper")
    config.algo.name = "ppo+epo"
    first = "the paper's column for PPO (config.algo.name='ppo+epo'): rollout.group_size=1, rollout.groups=128"
    assert next(dry_run.describe(config)) == first


def test_a_mesh_shares_the_memory():
    learner = learner_of(get_config("single"))
    whole, parts = (
        dry_run.held(abstract_state_on(learner, mesh.make_mesh(1, n, 1, jax.devices()[:n]))) for n in (1, 8)
    )  # fmt: skip
    params = init_params(learner.model, jax.random.key(0))
    assert whole == sum(x.nbytes for x in jax.tree.leaves(init_state(learner, params)))
    assert whole / 8 < parts < whole / 4


def test_the_time_is_that_of_the_operations_at_the_measured_rate(monkeypatch):
    """At a rate of 1e9 operations per second whatever the shape, decode costs what its products with weights cost."""
    monkeypatch.setattr(dry_run, "product_seconds", lambda model, rows: 2.0 * rows * model.d_model * model.d_ff / 1e9)
    config = alfworld.get_config("laptop")
    learner, one = learner_of(config), mesh.make_mesh(1, 1, 1, jax.devices()[:1])
    contexts, sampled = dry_run.longest_episodes(config)
    rollout, update = dry_run.seconds(config, learner, contexts, sampled, one)
    model = learner.model
    weights = model.d_model * model.vocab_size + sum(
        math.prod(shape) for shape in model.projection_sizes().values()
    ) * model.num_layers  # fmt: skip
    prefill = flops.sampling_flops(model, contexts, 0)
    assert rollout == pytest.approx((prefill + 2.0 * weights * sampled) / 1e9)
    assert update == pytest.approx(flops.update_flops(learner, contexts, sampled) / 1e9)
