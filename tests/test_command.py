"""The command line: what it accepts, what it refuses, and the config of a run folder."""

import json
import os
import re
from argparse import Namespace
from pathlib import Path

import pytest
from absl import flags

from epo_jax.command import ArgumentParser, parse, parse_config, run
from epo_jax.common.errors import Stopped, UserError
from epo_jax.parallel import hosts, mesh
from epo_jax.runs import lock
from epo_jax.runs.folder import check_workdir, open_workdir, read_config
from epo_jax.runs.versions import VERSION
from epo_jax.settings.config import flatten

SMOKE = "--config=configs/alfworld.py:smoke"


@pytest.fixture(autouse=True)
def _at_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def arguments(tmp_path, *rest):
    return ["main", f"--workdir={tmp_path / 'run'}", *rest]


def test_overrides_reach_the_config(tmp_path):
    command = parse(
        arguments(tmp_path, SMOKE, "--config.epo.lam=0.5", "--config.epo.turn_gate", "--config.eval.splits=valid_seen")
    )
    assert command.config.epo.lam == 0.5
    assert command.config.epo.turn_gate is True
    assert command.config.eval.splits == ("valid_seen",)
    assert command.workdir == tmp_path / "run"
    assert not command.resume
    assert not command.workdir.exists(), "parsing must write nothing"


def test_whole_numbers_are_accepted_for_real_keys(tmp_path):
    assert parse(arguments(tmp_path, SMOKE, "--config.epo.lam=1")).config.epo.lam == 1.0


def test_a_tilde_is_a_home_folder_in_every_programs_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = ArgumentParser()
    parser.add_argument("--checkpoint")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prompt")
    options = parser.parse_args(["--checkpoint=~/run", "--out=~/scores.json", "--prompt=~"])
    assert options.checkpoint == f"{tmp_path}/run" and options.out == tmp_path / "scores.json" and options.prompt == "~"
    with pytest.raises(UserError, match="--out=~nosuchuser/x: there is no home folder"):
        parser.parse_args(["--out=~nosuchuser/x"])


def test_none_is_a_value_of_keys_that_have_it(tmp_path):
    assert parse(arguments(tmp_path, SMOKE)).config.env.max_receptacles is not None
    assert parse(arguments(tmp_path, SMOKE, "--config.env.max_receptacles=None")).config.env.max_receptacles is None


def test_a_platform_that_is_not_there_is_named(monkeypatch):
    def devices():
        raise AssertionError

    monkeypatch.setattr("jax.devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match="JAX_PLATFORMS='cuda': JAX finds no such device"):
        mesh.devices_in_use()


def test_a_gpu_that_is_not_used_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(mesh, "_GPU", str(tmp_path))
    line, warning = mesh.devices_in_use().splitlines()
    assert (
        line == f"device: 8 x cpu, {os.cpu_count()} cores" and "which this JAX cannot use; pip install 'jax[cuda12]'" in warning
    )
    monkeypatch.setattr(mesh, "_GPU", str(tmp_path / "none"))
    assert mesh.devices_in_use() == line


def test_a_program_adds_its_own_flags(tmp_path):
    command = parse(
        arguments(tmp_path, SMOKE, "--split=train"),
        lambda values: flags.DEFINE_string("split", None, "", flag_values=values),
    )
    assert command.flags.split == "train"


def test_help_lists_the_settings_with_the_values_of_the_config(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(["main", "--help"], lambda values: flags.DEFINE_string("split", None, "Which split.", flag_values=values))
    told = capsys.readouterr().out
    for text in ("--split=...\n      Which split.", "epo.lam=0.001", "env.train_games=3553", "env.level=L1"):
        assert text in told
    with pytest.raises(SystemExit):
        parse(["sweep", SMOKE, "--config.epo.lam=0.25", "-h"], sweep=True)
    told = capsys.readouterr().out
    assert "epo.lam=0.25" in told and "env.train_games=12" in told and "sweep.kind=grid" in told and "env.level" not in told


def test_the_last_of_several_configs_counts_wherever_it_is(tmp_path):
    command = parse(arguments(tmp_path, SMOKE, "--config.epo.lam=0.25", "--config", "configs/scienceworld.py:smoke"))
    assert (command.config.env.name, command.config.epo.lam) == ("scienceworld", 0.25)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ([SMOKE, "--config.epo.lamb=1"], "config.epo.lamb is not a key .* did you mean config.epo.lam?"),
        ([SMOKE, "--config.optim.kappa_l=1"], "config.optim.kappa_l is not a key .* did you mean config.epo.kappa_l?"),
        ([SMOKE, "--config.nonsense=1"], "config.nonsense is not a key of configs/alfworld.py:smoke.$"),
        ([SMOKE, "--config.epo.lam.x=1"], "config.epo.lam.x is not a key"),
        ([SMOKE, "--config.epo=1"], "--config.epo=1"),
        ([SMOKE, "--config.epo.lam=much"], "--config.epo.lam=much must be a number, such as "),
        ([SMOKE, "--config.train.steps=1.5"], "--config.train.steps=1.5 must be a whole number, such as 2"),
        ([SMOKE, "--config.optim.lr=fast"], "--config.optim.lr=fast must be a number, such as "),
        ([SMOKE, "--config.eval.before=maybe"], "--config.eval.before=maybe must be True or False, such as "),
        ([SMOKE, "--config.epo.kappa_l=-1"], "config.epo.kappa_l=-1.0 must be zero or positive"),
        ([SMOKE, "--config.seed=None"], "--config.seed=None: the key needs a value; leave the option out for 0."),
        ([SMOKE, "--config.checkpoint.folder=None"], "--config.checkpoint.folder=None: the key needs a value"),
        ([SMOKE, "--config.sed=None"], "config.sed is not a key .* did you mean config.seed?"),
        ([SMOKE, "--config.algo.kl_kind=k33"], r"\(nearest: 'k3'\)"),
        ([SMOKE, "--config.eval.splits=valid_sen"], r"names 'valid_sen' \(nearest: 'valid_seen'\)"),
        ([SMOKE, "--config.lr=4"], "did you mean config.optim.lr or config.warm_start.lr?"),
        ([SMOKE, "--resum"], "--resum is not an option .nearest: 'resume'.."),
        ([SMOKE, "--seed=3"], "--seed is not an option; did you mean --config.seed?"),
        ([SMOKE, "--lr", "1e-3"], "--lr is not an option; did you mean --config.optim.lr or --config.warm_start.lr?"),
        (["--lam=1"], "--lam is not an option; did you mean --config.epo.lam?"),
        ([SMOKE, "train"], "'train' is not understood"),
        ([SMOKE, "--resume"], "holds no run"),
        (["--config=configs/alfworld.py:tiny"], "no preset 'tiny'"),
        (["--config=configs/alfworld.py:laptp"], "no preset 'laptp' .nearest: 'laptop'."),
        (
            ["--config=configs/alfword.py"],
            "--config=configs/alfword.py: there is no such file.* .nearest: 'alfworld'.; choose",
        ),
        (["--config=alfword"], "no config of that name .nearest: 'alfworld'.; choose one of ablation, alfworld, scienceworld"),
        (["--config=elsewhere/alfworld.py"], "there is no such file"),
        (["--config=tests/toy_sweep"], "name a file that ends in .py"),
        (["--config=__init__"], "no config of that name"),
        (["--config.epo.lam=1"], "config"),
        ([], "--config is missing"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_code_2(tmp_path, capsys, monkeypatch, rest, message):
    monkeypatch.setattr("sys.argv", arguments(tmp_path, *rest))
    assert run(parse) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    with pytest.raises(UserError, match=message):
        parse(arguments(tmp_path, *rest))
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(["main", SMOKE, "--workdir=~/runs/first"]).workdir == tmp_path / "runs" / "first"


def test_local_paths_are_stored_as_absolute_ones(tmp_path, monkeypatch):
    """A name on the hub and a bucket stay as they are."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = "--config.env.data_dir=~/data", "--config.checkpoint.folder=states", "--config.init_from.run=runs/x/../first"
    config = parse(arguments(tmp_path, SMOKE, *paths, "--config.model.path=tests")).config
    here = os.getcwd()
    assert config.env.data_dir == f"{tmp_path}/data" and config.checkpoint.folder == f"{here}/states"
    assert config.init_from.run == f"{here}/runs/first" and config.model.path == f"{here}/tests"
    bucket = "--config.model.path=Qwen/Qwen3-0.6B", "--config.checkpoint.folder=gs://bucket/run"
    config = parse(arguments(tmp_path, SMOKE, *bucket)).config
    assert (config.model.path, config.checkpoint.folder) == ("Qwen/Qwen3-0.6B", "gs://bucket/run")
    with pytest.raises(UserError, match="config.env.data_dir=~nosuchuser/data: there is no home folder ~nosuchuser"):
        parse(arguments(tmp_path, SMOKE, "--config.env.data_dir=~nosuchuser/data"))


def test_a_run_without_a_folder_gets_one_with_the_date(capsys):
    command = parse(["train", SMOKE])
    assert re.fullmatch(r"runs/alfworld-smoke-\d{8}-\d{6}", str(command.workdir))
    assert capsys.readouterr().out == f"run folder: {command.workdir}\n"
    assert str(parse(["sweep", "--config=ablation"], sweep=True).workdir).startswith("sweeps/ablation-2")
    for option in ("--resume", "--coordinator=host:1"):
        with pytest.raises(UserError, match=f"{option.partition('=')[0]}: name the run folder first"):
            parse(["train", SMOKE, option], hosts.define_flags)


def test_the_folder_may_come_first(tmp_path):
    assert parse(["train", str(tmp_path / "run"), SMOKE]).workdir == tmp_path / "run"
    with pytest.raises(UserError, match="'one' is not understood, as --workdir names the folder"):
        parse(["train", "one", SMOKE, "--workdir=two"])
    parser = ArgumentParser(prog="epo-jax evaluate")
    parser.add_folder("checkpoint", "run folder")
    assert parser.parse_known_args(["one", "--config", "alfworld"]) == (Namespace(checkpoint="one"), ["--config", "alfworld"])
    assert parser.parse_known_args(["--checkpoint", "one"])[0].checkpoint == "one"
    with pytest.raises(UserError, match="name a folder first, for example epo-jax evaluate runs/first"):
        parser.parse_args([])


def test_the_config_of_another_run_can_be_taken(tmp_path):
    open_workdir(parse(arguments(tmp_path, SMOKE, "--config.epo.lam=0.25", "--config.seed=3")))
    config = parse(["train", str(tmp_path / "new"), f"--config={tmp_path / 'run'}", "--config.seed=4"]).config
    assert (config.epo.lam, config.seed, config.env.train_games) == (0.25, 4, 12)
    assert parse_config([f"--config={tmp_path / 'run'}", "--config.epo.lam=1"]).epo.lam == 1.0


def test_longer_training_is_shown(tmp_path):
    open_workdir(parse(arguments(tmp_path, SMOKE, "--config.epo.lam=0.25")))
    with pytest.raises(UserError, match="to train longer, begin a new run that goes on from it: epo-jax") as refusal:
        parse(arguments(tmp_path, "--resume", "--config.train.steps=9"))
    command = str(refusal.value).partition("goes on from it: epo-jax ")[2].rstrip(".").split()
    config = parse(command).config
    assert (config.train.steps, config.epo.lam, config.init_from.state) == (9, 0.25, "everything")
    assert config.init_from.run == str(tmp_path / "run")


def test_config_file_round_trip(tmp_path):
    command = parse(arguments(tmp_path, SMOKE, "--config.epo.lam=0.25"))
    open_workdir(command)
    read = read_config(command.workdir)
    assert flatten(read) == flatten(command.config)
    assert read.is_locked
    assert json.loads((command.workdir / "config.json").read_text())["epo"]["lam"] == 0.25
    assert os.listdir(command.workdir) == ["config.json"], "no temporary file left"


def test_unlimited_rooms_survive_the_round_trip(tmp_path):
    command = parse(arguments(tmp_path, "--config=configs/alfworld.py"))
    open_workdir(command)
    assert read_config(command.workdir).env.max_receptacles is None


def test_a_second_run_never_overwrites_the_first(tmp_path):
    open_workdir(parse(arguments(tmp_path, SMOKE)))
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        parse(arguments(tmp_path, SMOKE))


def test_a_run_folder_without_its_config_is_not_begun_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}')
    with pytest.raises(UserError, match="run holds metrics.jsonl of a run whose config.json is missing; put that back"):
        parse(arguments(tmp_path, SMOKE))


def test_a_living_run_is_named_before_anything_else(tmp_path):
    open_workdir(parse(arguments(tmp_path, SMOKE)))
    with lock.hold(tmp_path / "run"):
        for rest in ([SMOKE], ["--resume"]):
            with pytest.raises(UserError, match=f"run is in use by process {os.getpid()} on"):
                parse(arguments(tmp_path, *rest))
    parse(arguments(tmp_path, "--resume"))


def test_resume_takes_the_runs_own_config(tmp_path):
    open_workdir(parse(arguments(tmp_path, SMOKE, "--config.epo.lam=0.25")))
    command = parse(arguments(tmp_path, "--resume"))
    assert command.resume and command.config.epo.lam == 0.25
    # How often it is saved may change, what is learned may not.
    same = parse(arguments(tmp_path, SMOKE, "--config.epo.lam=0.25", "--config.checkpoint.every=7", "--resume"))
    assert same.config.checkpoint.every == 7
    same = parse(arguments(tmp_path, SMOKE, "--config.epo.lam=0.25", "--config.mesh.fsdp=2", "--resume"))
    assert same.config.mesh.fsdp == 2
    with pytest.raises(UserError, match="config.epo.lam=0.005 differs from the run's 0.25; leave --config out"):
        parse(arguments(tmp_path, SMOKE, "--resume"))
    assert parse(arguments(tmp_path, "--resume", "--config.epo.lam=0.5")).changes == {"epo.lam": (0.25, 0.5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read as the config of a run"),
        (lambda text: "[]", "cannot be read as the config of a run"),
        (lambda text: text.replace('"lam": ', '"lambda": '), "config.json lacks config.epo.lam; restore it"),
        (lambda text: text.replace('"lam": ', '"lambda": 1, "lam": '), "has config.epo.lambda, which is not a key; restore it"),
        (
            lambda text: text.replace(f'"version": {VERSION}', f'"version": {VERSION + 1}'),
            f"has version {VERSION + 1} of the format, .* reads 1 to {VERSION}",
        ),
        (lambda text: text.replace('"lam": 0.005', '"lam": "high"'), "epo.lam='high' has the wrong type"),
        (lambda text: text.replace('"lam": 0.005', '"lam": -1.0'), "epo.lam=-1.0 must be zero or positive"),
    ],
)
def test_a_damaged_config_file_is_refused(tmp_path, change, message):
    command = parse(arguments(tmp_path, SMOKE))
    open_workdir(command)
    path = command.workdir / "config.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message):
        parse(arguments(tmp_path, "--resume"))


def test_a_bucket_is_for_checkpoints_alone():
    with pytest.raises(UserError, match="must be a local folder.*--config.checkpoint.folder=gs://bucket/run"):
        parse(["main", SMOKE, "--workdir=gs://bucket/run"])


def test_the_exit_codes(monkeypatch, capsys):
    def raising(error):
        def main(argv):
            raise error

        return main

    assert (run(lambda argv: None), run(raising(UserError("bad"))), run(raising(Stopped("saved")))) == (0, 2, 75)
    assert capsys.readouterr().err == "error: bad\nsaved\n"


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_workdir(tmp_path / "file" / "run", resume=False)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):  # the superuser may write everywhere
        with pytest.raises(UserError, match="cannot be written"):
            open_workdir(parse(["main", SMOKE, "--workdir=/proc/run"]))
    else:
        with pytest.raises(UserError, match="no permission"):
            check_workdir(closed / "run", resume=False)
