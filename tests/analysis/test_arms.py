"""Runs become arms, whose names tell what differs."""

import pytest

from epo_jax.analysis.arms import arms_of, naming_keys, setting_text
from epo_jax.analysis.read import Run

BASE = {"algo.name": "grpo", "epo.lam": 0.01, "epo.alpha": 5.0, "train.steps": 8, "warm_start.steps": 100, "env.workers": 2}


def run(name, arm=None, **changes):
    return Run(name, arm, BASE | {"seed": 0} | {key.replace("__", "."): value for key, value in changes.items()}, [], [])


def names(*runs):
    return [arm.name for arm in arms_of(runs)]


def test_seeds_and_machinery_do_not_tell_runs_apart():
    (arm,) = arms_of([run("a"), run("b", seed=1), run("c", seed=2, env__workers=8)])
    assert [each.name for each in arm.runs] == ["a", "b", "c"]


def test_names_have_the_section_of_a_setting_that_other_sections_have_too():
    assert names(run("a"), run("b", train__steps=200)) == ["train.steps 8", "train.steps 200"]
    assert names(run("a"), run("b", epo__lam=0.1, algo__name="ppo")) == ["grpo, lam 0.01", "ppo, lam 0.1"]


def test_of_many_differences_a_name_has_those_that_suffice_and_the_method_first():
    others = {"algo__name": "ppo", "epo__lam": 0.1, "epo__alpha": 1.0, "train__steps": 9}
    assert names(run("a"), run("b", **others)) == ["grpo", "ppo"]
    assert names(run("a"), run("b", **others), run("c", **(others | {"epo__lam": 0.2}))) == [
        "grpo, lam 0.01", "ppo, lam 0.1", "ppo, lam 0.2",
    ]  # fmt: skip


def test_runs_that_need_too_many_settings_are_named_by_folder():
    single = [{key: new} for key, new in (("algo__name", "ppo"), ("epo__lam", 1.0), ("epo__alpha", 1.0), ("train__steps", 9))]
    assert names(run("a"), *(run(f"b{i}", **change) for i, change in enumerate(single))) == ["a", "b0", "b1", "b2", "b3"]


def test_a_given_name_joins_runs_and_is_kept():
    assert names(run("a", "first"), run("b", "first", epo__lam=9.0), run("c")) == ["first", "c"]


def test_arms_of_one_name_are_told_apart_by_folder():
    bare = [Run(name, None, {}, [], []) for name in ("run", "run")]
    assert names(*bare) == ["run (run)", "run (run)"]
    assert names(run("a", epo__lam=0.5), run("a"), Run("a", None, {}, [], [])) == ["lam 0.5", "lam 0.01", "a"]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("algo.name", "ppo+epo", "ppo+epo"),
        ("epo.kappa_r", 1.25, "kappa_r 1.25"),
        ("optim.lr", 0.0004, "optim.lr 0.0004"),
        ("algo.whiten", False, "whiten False"),
        ("eval.splits", ["valid_seen", "train"], "splits valid_seen/train"),
        ("own.key", 3, "key 3"),
    ],
)
def test_a_setting_as_text(key, value, text):
    assert setting_text(key, value) == text


def test_no_run_with_a_config_has_no_naming_keys():
    assert naming_keys([]) == []
