"""Sweeps: every member is the run that it would be alone, whatever becomes of the others."""

import gc
import json
import os
import re
import shutil
import signal
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from benchmarks.kill import without_times
from epo_jax import main as program
from epo_jax import sweep
from epo_jax.common.errors import Stopped, UserError
from epo_jax.configs import ablation
from epo_jax.envs.base import environment
from epo_jax.models import generate, lora
from epo_jax.models.decoder import decoder_config
from epo_jax.models.tokenizer import load_tokenizer
from epo_jax.runs import figures, frozen_base, lock, metrics
from epo_jax.runs.folder import read_config
from epo_jax.runs.metrics import read_rows
from epo_jax.runs.policies import fit_vocabulary, load_run
from epo_jax.settings.config import flatten
from epo_jax.training import initial_policy, loop
from epo_jax.training.grid import programs, refuse_what_members_cannot_share
from epo_jax.training.initial_policy import expert_demonstrations, own_tokenizer
from tests.toy_sweep import get_config

# Two seeds of points that differ in everything that is data.
POINTS = (
    "--config.sweep.kind=list",
    "--config.sweep.seeds=(0, 1)",
    "--config.sweep.over.epo.lam=(0.01, 0.3)",
    "--config.sweep.over.epo.kappa_r=(2.0, 0.5)",
    "--config.sweep.over.algo.clip_high=(0.2, 0.05)",
    "--config.sweep.over.optim.lr=(3e-3, 1e-3)",
)
# One more, whose gradients are soon beyond any number, and which stops at the first RL step with none that is finite.
WITH_A_LOST_ONE = (
    *POINTS[:2], *(point.replace(")", ", 0.1)") for point in POINTS[2:5]), POINTS[5].replace(")", ", 1e34)"),
    "--config.train.max_skipped=1",
)  # fmt: skip
ONE_BY_ONE, SPREAD = ((f"--config.sweep.at_once={n}", f"--config.sweep.devices={n}") for n in (1, 2))


def run(folder, *arguments, preset=""):
    sweep.main(["sweep", f"--config=tests/toy_sweep.py:{preset}", f"--workdir={folder}", *arguments])
    return folder


def params(folder, step=3):
    """What was trained, as one vector."""
    with ocp.StandardCheckpointer() as reader:
        saved = reader.restore(folder / "checkpoints" / str(step) / "state")
    assert int(saved["step"]) == step
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(saved["params"])])


def names(folder):
    return [member["name"] for member in json.loads((folder / "sweep.json").read_text())["members"]]


@pytest.fixture(scope="module", autouse=True)
def at_root(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        patch.setattr(figures, "draw", lambda folder: [])
        yield


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return run(tmp_path_factory.mktemp("sweep") / "sweep", *WITH_A_LOST_ONE, *ONE_BY_ONE)


@pytest.fixture(scope="module")
def going(swept):
    """The run folders of those who reach the end."""
    return [swept / "members" / name for name in names(swept) if "1e+34" not in name]


def alone(folder, config, preset="single"):
    """A run of `epo_jax.main` with a member's config."""
    differing = {k: v for k, v in flatten(config).items() if v != flatten(get_config(preset)).get(k)}
    program.main([
        "main", f"--config=tests/toy_sweep.py:{preset}", f"--workdir={folder}",
        *(f"--config.{key}={value}" for key, value in differing.items()),
    ])  # fmt: skip
    return folder


def test_a_member_is_the_run_that_it_would_be_alone(going, tmp_path):
    member = going[3]
    single = alone(tmp_path / "single", read_config(member))
    np.testing.assert_array_equal(params(member), params(single))
    assert np.abs(params(member) - params(member, 0)).max() > 1e-3
    for name in ("metrics.jsonl", "eval.jsonl"):
        ours, theirs = (list(map(without_times, read_rows(folder / name))) for folder in (member, single))
        assert len(ours) == 3 and ours == theirs
    assert remembered(member) == remembered(single) and remembered(member)[0]["best"] >= 0.0
    [ours], [theirs] = (read_rows(folder / "processes.jsonl") for folder in (member, single))
    assert ours["parameters"] == theirs["parameters"] > 0 and ours["device"] == theirs["device"]


def remembered(folder):
    """What the last checkpoint has besides the state, times aside: what the host remembers, and the success by which it ranks."""
    items = ("progress/metadata", "metrics/metrics")
    return [without_times(json.loads((folder / "checkpoints" / "3" / item).read_text())) for item in items]


def test_each_seed_may_begin_from_a_run_of_its_own(going, tmp_path):
    """One run folder for each seed, and one for all seeds; their weights are taken, whatever the new members' coefficients."""
    first = [folder for folder in going if "lam0.01-" in folder.name]
    assert [folder.name[-5:] for folder in first] == ["seed0", "seed1"]
    assert np.abs(params(first[0]) - params(first[1])).max() > 1e-3
    short = "--config.train.steps=1", "--config.eval.before=False", "--config.eval.every=0", "--config.sweep.seeds=(0, 1)"
    own = run(tmp_path / "own", *short, f"--config.init_from.run={first[0]}".replace("seed0", "seed{seed}"))
    shared = run(tmp_path / "shared", *short, f"--config.init_from.run={first[0]}", "--config.init_from.step=2")
    for member, source in zip(names(own), first, strict=True):
        np.testing.assert_array_equal(params(own / "members" / member, 0), params(source))
    for member in names(shared):
        np.testing.assert_array_equal(params(shared / "members" / member, 0), params(first[0], 2))


def test_members_may_go_on_from_the_whole_state_of_one_run(going, tmp_path):
    """With that run's method and coefficients a member is the rest of it, bit for bit; others leave it at their own steps."""
    [source] = [folder for folder in going if "lam0.01-" in folder.name and folder.name.endswith("seed0")]
    whole = f"--config.init_from.run={source}", "--config.init_from.state=everything"
    arms = "--config.sweep.arms=('grpo+epo', 'grpo+epo_base')", "--config.sweep.over.epo.start_step=(0, 2)"
    with pytest.raises(UserError, match="config.init_from.step=-1 must be a number of RL steps in a sweep"):
        run(tmp_path / "none", *whole, *arms)
    folder = run(tmp_path / "sweep", *whole, "--config.init_from.step=1", *arms, *ONE_BY_ONE)
    same, late, base, _ = (folder / "members" / name for name in names(folder))
    rows = [[without_times(row) for row in read_rows(each / "metrics.jsonl")] for each in (source, same, late, base)]
    assert rows[1] == rows[0][1:] and [row["step"] for row in rows[1]] == [1, 2]
    for step in (1, 2, 3):
        np.testing.assert_array_equal(params(same, step), params(source, step))
    for member, step, equal in ((base, 1, same), (late, 2, base)):
        np.testing.assert_array_equal(params(member, step), params(equal, step))
        assert np.abs(params(member, step + 1) - params(equal, step + 1)).max() > 0.0
    for member in names(folder):
        for step in ("2", "3"):
            shutil.rmtree(folder / "members" / member / "checkpoints" / step)
    ends = [params(source), read_rows(same / "eval.jsonl")]
    sweep.main(["sweep", f"--workdir={folder}", "--resume"])
    np.testing.assert_array_equal(params(same), ends[0])
    assert list(map(without_times, read_rows(same / "eval.jsonl"))) == list(map(without_times, ends[1]))


def test_a_sweep_has_what_a_run_has(tmp_path, monkeypatch):
    """Checkpoints elsewhere, a profile, wall time over processes, and as many RL steps without a finite gradient."""
    short = "--config.sweep.seeds=(0, 1)", "--config.train.steps=2", "--config.eval.before=False", "--config.eval.every=0"
    elsewhere = f"--config.checkpoint.folder={tmp_path / 'elsewhere'}"
    folder = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stuck", lambda metrics: True)
        with pytest.raises(UserError, match="Every member of the sweep stopped"):
            run(folder, *short, *ONE_BY_ONE, elsewhere, "--profile_steps=0:1", "--config.train.max_skipped=2")
    members = json.loads((folder / "sweep.json").read_text())["members"]
    assert [member["stopped"] for member in members] == [1, 1]
    assert len(list((folder / "profile").rglob("*.xplane.pb"))) == 1
    for name in names(folder):
        saved = tmp_path / "elsewhere" / name
        assert {path.name for path in saved.iterdir()} == {"0", "1"} and not (folder / "members" / name / "checkpoints").exists()
        assert json.loads((saved / "1" / "progress" / "metadata").read_text())["skipped"] == 1
    # What the last step learned with is changed, and it is taken again.
    sweep.main(["sweep", f"--workdir={folder}", "--resume", "--config.train.max_skipped=3"])
    for name in names(folder):
        rows = read_rows(folder / "members" / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == [0, 1] and 0 < rows[0]["wall_seconds"] < rows[1]["wall_seconds"]
        assert (tmp_path / "elsewhere" / name / "2").is_dir()
    with pytest.raises(UserError, match="already holds the checkpoints of a run"):
        run(tmp_path / "other", *short, elsewhere)
    with pytest.raises(UserError, match="--profile_steps=0:1: the run goes on from step 2"):
        sweep.main(["sweep", f"--workdir={folder}", "--resume", "--profile_steps=0:1"])


def test_a_member_that_is_no_longer_finite_stops_alone(swept, going):
    told = {m["name"]: m["stopped"] for m in json.loads((swept / "sweep.json").read_text())["members"]}
    lost = {name: step for name, step in told.items() if step is not None}
    assert len(told) == 6 and lost.keys() == told.keys() - {member.name for member in going}
    for name, step in lost.items():
        assert len(read_rows(swept / "members" / name / "metrics.jsonl")) == step + 1 < 3
    assert all(np.isfinite(params(member)).all() for member in going)


def test_a_finished_sweep_has_nothing_to_resume(swept, tmp_path, capsys):
    again = shutil.copytree(swept, tmp_path / "again")
    for member in (again / "members").iterdir():
        (member / "figures").mkdir()
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*") if path.is_file()}
    sweep.main(["sweep", str(again), "--resume"])
    assert "is finished: its 6 members have done their RL steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*") if path.is_file()} == before


def test_members_may_be_mapped_together_and_spread_over_devices(going, tmp_path):
    """Two by two on devices of their own. Sums come in another order, which Adam shows where a gradient is next to nothing."""
    other = run(tmp_path / "sweep", *POINTS, *SPREAD)
    assert set(names(other)) == {member.name for member in going}
    ends = []
    for member in going:
        want, start = params(member), params(member, 0)
        ends.append(params(other / "members" / member.name))
        assert np.linalg.norm(ends[-1] - want) < 1e-3 * np.linalg.norm(want - start)
        assert np.abs(ends[-1] - want).max() < 2e-4
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(ends) for b in ends[:i])


def test_a_killed_sweep_goes_on_from_the_last_step_that_all_members_saved(swept, going, tmp_path, monkeypatch):
    """One member had saved its second step when the sweep was killed. Then it is asked to stop."""
    again = shutil.copytree(swept, tmp_path / "again")
    for i, member in enumerate(going):
        for step in ("3", "2") if i else ("3",):
            shutil.rmtree(again / "members" / member.name / "checkpoints" / step)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="2 RL steps done and saved"):
        patch.setattr(metrics, "members_line", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        sweep.main(["sweep", f"--workdir={again}", "--resume"])
    sweep.main(["sweep", f"--workdir={again}", "--resume"])
    assert (again / "sweep.json").read_text() == (swept / "sweep.json").read_text()
    for before in going:
        after = again / "members" / before.name
        np.testing.assert_array_equal(params(after), params(before))
        for file in ("metrics.jsonl", "eval.jsonl"):
            ours, theirs = (list(map(without_times, read_rows(folder / file))) for folder in (after, before))
            assert ours == theirs


def test_a_sweep_killed_after_its_warm_starts_keeps_them(swept, going, tmp_path, monkeypatch):
    again = shutil.copytree(swept, tmp_path / "again")
    for folder in (again / "members").iterdir():
        shutil.rmtree(folder / "checkpoints")
        (folder / "metrics.jsonl").unlink()
    monkeypatch.setattr(initial_policy, "expert_demonstrations", lambda *_: pytest.fail("played its experts again"))
    cloned = again / "warm_start" / "seed1" / "model.safetensors"
    whole = cloned.read_bytes()
    cloned.write_bytes(b"")
    with pytest.raises(UserError, match=r"weights in .*seed1 cannot be read .*; move that folder away"):
        sweep.main(["sweep", f"--workdir={again}", "--resume"])
    cloned.write_bytes(whole)
    sweep.main(["sweep", f"--workdir={again}", "--resume"])
    for member in going:
        np.testing.assert_array_equal(params(again / "members" / member.name), params(member))


def files(folder):
    """Every file below a folder but the locks, with its time."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("lost", [("0", "1", "2", "3"), ("2", "3")], ids=["all", "more than a kill leaves out"])
def test_a_member_whose_checkpoints_are_gone_costs_the_others_nothing(swept, going, tmp_path, lost):
    again = shutil.copytree(swept, tmp_path / "again")
    member = again / "members" / going[1].name
    for step in lost:
        shutil.rmtree(member / "checkpoints" / step)
    before = files(again / "members")
    with pytest.raises(UserError, match=f"{re.escape(going[1].name)}/checkpoints lacks .*put them back") as refusal:
        sweep.main(["sweep", f"--workdir={again}", "--resume"])
    assert "\n" not in str(refusal.value)
    assert {path: time for path, time in files(again / "members").items() if path.name != "config.json"} == {
        path: time for path, time in before.items() if path.name != "config.json"
    }


def test_a_member_that_cannot_be_restored_costs_the_others_nothing(swept, going, tmp_path):
    """Nothing of the other members' later steps goes before all of them are restored."""
    again = shutil.copytree(swept, tmp_path / "again")
    for i, member in enumerate(going):
        if i != 0:
            shutil.rmtree(again / "members" / member.name / "checkpoints" / "3")
    for path in (again / "members" / going[-1].name / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match="checkpoints/2"):
        sweep.main(["sweep", f"--workdir={again}", "--resume"])
    assert (again / "members" / going[0].name / "checkpoints" / "3" / "state").is_dir()


def test_a_sweep_and_its_members_are_for_one_process(swept, going, tmp_path):
    """And a run is for `epo_jax.main`, a sweep for `epo_jax.sweep`."""
    for held in (swept, going[0]):
        with lock.hold(held), pytest.raises(UserError, match=f"{re.escape(str(held))} is in use by process {os.getpid()} on "):
            sweep.main(["sweep", f"--workdir={swept}", "--resume"])
    with lock.hold(going[0]), pytest.raises(UserError, match="is in use by process"):
        program.main(["main", f"--workdir={going[0]}", "--resume"])
    for arguments in ([f"--workdir={swept}", "--resume"], ["--config=tests/toy_sweep.py", f"--workdir={tmp_path / 'run'}"]):
        with pytest.raises(UserError, match="has a section sweep, so it is for epo-jax sweep"):
            program.main(["main", *arguments])
    for more in ([], ["--config=tests/toy_sweep.py"]):
        with pytest.raises(UserError, match="has no section sweep, so it is for epo-jax train"):
            sweep.main(["sweep", f"--workdir={going[0]}", "--resume", *more])
    assert not (tmp_path / "run").exists()


def test_seeds_whose_tokenizers_differ_in_size_are_the_runs_that_they_would_be_alone(tmp_path):
    """Each has ids of its own that must not be sampled, so that they cannot share a program."""
    settings = ("model.vocab_size=304", "warm_start.episodes=3", "warm_start.steps=2", "train.steps=1", "eval.before=False")
    swept = run(tmp_path / "sweep", "--config.sweep.seeds=(0, 4)", *(f"--config.{setting}" for setting in settings))
    folders = [swept / "members" / name for name in names(swept)]
    assert [load_tokenizer(folder / "tokenizer").vocab_size for folder in folders] == [304, 288]
    assert all(len(read_rows(folder / "metrics.jsonl")) == 1 for folder in folders)
    single = alone(tmp_path / "single", read_config(folders[0]))
    np.testing.assert_array_equal(params(folders[0], 1), params(single, 1))


def test_seeds_whose_texts_yield_about_as_many_tokens_share_a_program():
    """304 and 301 tokens, of 320 that are asked for."""
    config, models = get_config(), set()
    config.update(model={"vocab_size": 320}, warm_start={"episodes": 3})
    for config.seed in (0, 4):
        demonstrations = expert_demonstrations(config, environment("toy").list_tasks("train", {}))
        tokenizer = own_tokenizer(config, demonstrations)
        models.add(fit_vocabulary(decoder_config(config.model), tokenizer, ""))
    assert [model.unused_ids for model in models] == [((288, 320),)]


def test_the_number_of_members_changes_no_number_of_traces(swept, tmp_path, max_traces):
    """Two, after six: what plays is compiled already, and the train step of a sweep is traced once."""
    for function in (generate.decode, generate.extend, generate.take_slots, generate.copy_slots):
        max_traces(function, 0)
    max_traces(types.SimpleNamespace(__name__="train_step"), 1)
    two = "--config.sweep.seeds=(0, 1)", "--config.train.steps=1", "--config.eval.before=False"
    run(tmp_path / "sweep", *two, *ONE_BY_ONE)


def kept_base(run):
    """Digest of the base that a run's adapters are read with."""
    config = read_config(run)
    return frozen_base.digest(lora.split(load_run(run, config, 1).params)[0])


def embeddings() -> int:
    """Arrays of the size of the base's embedding that are in memory."""
    return sum(x.shape == (300, 16) for x in jax.live_arrays())


def test_adapters_share_a_base(tmp_path, monkeypatch):
    folder = run(tmp_path / "sweep", POINTS[5], *ONE_BY_ONE, preset="lora")
    member = folder / "members" / names(folder)[1]
    single = alone(tmp_path / "single", read_config(member), "lora-single")
    np.testing.assert_array_equal(params(member, 2), params(single, 2))
    assert np.abs(params(member, 2) - params(folder / "members" / names(folder)[0], 2)).max() > 1e-4
    assert [path for path in folder.rglob("*") if path.is_file() and b"base.embedding" in path.read_bytes()] == []
    assert kept_base(member) == kept_base(single)
    # A resumed sweep holds one, and so does each member's folder by reference.
    again = shutil.copytree(folder, tmp_path / "again")
    for each in (again / "members").iterdir():
        shutil.rmtree(each / "checkpoints" / "2")
    bases = []
    monkeypatch.setattr(metrics, "members_line", lambda *_: bases.append(embeddings()))
    gc.collect()
    before = embeddings()
    sweep.main(["sweep", f"--workdir={again}", "--resume"])
    assert bases == [before + 1]
    for name in names(folder):
        np.testing.assert_array_equal(params(again / "members" / name, 2), params(folder / "members" / name, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.sweep.over.epo.penalty=('hinge', 'indicator')"], "config.epo.penalty changes the program"),
        (["--config.sweep.over.model.d_model=(16, 32)"], "config.model.d_model changes the program"),
        (["--config.sweep.over.epo.lamda=(0.1,)"], "epo.lamda is not a coefficient"),
        (["--config.sweep.over.algo.kl_coef=(0.0, 0.1)"], "sweep.over.algo.kl_coef: 0.1 makes another program than 0.0"),
        (["--config.sweep.over.epo.lam=(0.1, -0.1)"], "config.epo.lam=-0.1 must be zero or positive"),
        (["--config.sweep.arms=('grpo+epoch',)"], "'epoch' in 'grpo\\+epoch' is no variant"),
        (["--config.sweep.kind=list", "--config.sweep.over.epo.lam=(0.1, 0.2)", "--config.sweep.over.epo.alpha=(1.0,)"],
         "as many values of each key, not 1 of epo.alpha, 2 of epo.lam"),
        (["--config.sweep.kind=random", "--config.sweep.over.epo.lam=(0.1,)"], "takes .lowest, highest."),
        (["--config.sweep.kind=bayes"], "'bayes' is not known"),
        (["--config.sweep.at_once=-1"], "config.sweep.at_once=-1 must be zero or positive"),
        (["--config.sweep.over.epo.window=(2.5,)"], "sweep.over.epo.window: 2.5 must be a whole number"),
        (["--config.sweep.over.epo.lam=('much',)"], "sweep.over.epo.lam: 'much' must be a number"),
        (["--config.sweep.seeds=()"], "seeds is empty"),
        (["--config.sweep.seeds=(0, 4294967296)"], "config.seed=4294967296 must be a whole number from 0 to 4294967295"),
        (["--config.model.lora_rank=2", "--config.sweep.seeds=(0, 1)"], "members share their base"),
        (["--config.rollout.devices=2"], "must be 1 in a sweep"),
        (["--config.mesh.fsdp=4"], "config.mesh.fsdp=4 must be 0 in a sweep"),
        (["--processes=2"], "--processes: a sweep runs on one host, over whose devices its members are spread"),
    ],
)  # fmt: skip
def test_what_members_cannot_share_is_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as refusal:
        run(tmp_path / "sweep", *arguments)
    assert "\n" not in str(refusal.value) and not (tmp_path / "sweep").exists()


def grid(**sweep_settings):
    config = get_config()
    over = sweep_settings.pop("over", {})
    config.sweep.update(sweep_settings)
    for key, values in over.items():
        section, _, leaf = key.partition(".")
        config.sweep.over[section][leaf] = values
    return programs(config)


def test_arms_that_differ_in_coefficients_share_a_program():
    arms = ("ppo", "ppo+epo_base", "ppo+epo", "ppo+epo_decay", "ppo+ea", "grpo", "grpo+epo", "grpo+released")
    groups = grid(arms=arms, seeds=(0, 1, 2))
    assert [[m.coefficients["algo.name"] for m in group[::3]] for group in groups] == [
        ["ppo", "ppo+epo_base", "ppo+epo", "ppo+epo_decay"], ["ppo+ea"], ["grpo", "grpo+epo"], ["grpo+released"],
    ]  # fmt: skip
    arms = "grpo+epo_base", "grpo+epo", "grpo+epo_two_sided", "grpo+epo_decay_steps", "grpo+epo_initial", "grpo+epo_mean_dw"
    assert [len(group) for group in grid(arms=arms)] == [4, 1, 1]
    assert groups[0][4].name == "ppo+epo_base-seed1" and groups[0][4].config.seed == 1
    assert groups[0][4].hyper.alpha == 0.0 and groups[0][7].hyper.alpha == 2.0
    assert "sweep" not in groups[0][0].config


def test_a_coefficient_that_an_arm_does_not_read_makes_no_members():
    [found] = grid(arms=("grpo", "grpo+epo"), over={"epo.lam": (0.1, 0.2), "optim.lr": (1e-3, 2e-3)})
    assert [m.name for m in found] == [
        "grpo-lam0.1-lr0.001-seed0", "grpo-lam0.1-lr0.002-seed0", "grpo+epo-lam0.1-lr0.001-seed0",
        "grpo+epo-lam0.1-lr0.002-seed0", "grpo+epo-lam0.2-lr0.001-seed0", "grpo+epo-lam0.2-lr0.002-seed0",
    ]  # fmt: skip
    assert [m.hyper.lr for m in found[:2]] == [np.float32(1e-3), np.float32(2e-3)]


def test_a_coefficient_that_is_a_whole_number_is_swept_as_one():
    [found] = grid(over={"epo.window": (3, 5.0)})
    assert [m.config.epo.window for m in found] == [3, 5] and [m.hyper.window for m in found] == [3.0, 5.0]
    [found] = grid(kind="random", samples=9, over={"epo.window": (1, 4)})
    assert {m.config.epo.window for m in found} == {1, 2, 3, 4}


def test_random_members_are_drawn_between_the_bounds_and_the_same_each_time():
    over = {"epo.lam": (1e-4, 1.0), "epo.kappa_l": (0.0, 0.5)}
    [found] = grid(kind="random", samples=200, over=over)
    again = grid(kind="random", samples=200, over=over)[0]
    assert [m.coefficients for m in found] == [m.coefficients for m in again]
    lam, kappa = (np.array([m.coefficients[key] for m in found]) for key in over)
    assert 1e-4 < lam.min() and lam.max() < 1.0 and 0.35 < np.mean(lam < 1e-2) < 0.65
    assert 0.0 < kappa.min() and kappa.max() < 0.5 and 0.35 < np.mean(kappa < 0.25) < 0.65


@pytest.mark.parametrize("env", ["", "-scienceworld"])
@pytest.mark.parametrize(("size", "counts"), [(s, [20, 5, 5, 15, 10, 5]) for s in ("paper", "laptop")] + [("smoke", [4])])
def test_the_ablation_has_every_arm_of_the_paper(size, env, counts):
    """PPO with its EPO and Decay arms in one program, W/O DW and EA in others; GRPO, GiGPO and the release."""
    config = ablation.get_config(size + env)
    refuse_what_members_cannot_share(config)
    assert [len(group) for group in programs(config)] == counts
