"""Paths with a tilde."""

import pytest

from epo_jax.errors import UserError
from epo_jax.files import expand_user


def test_a_leading_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_user("~/runs/first", "--workdir") == tmp_path / "runs" / "first"
    assert str(expand_user("runs/~first", "--workdir")) == "runs/~first"
    with pytest.raises(UserError, match="--workdir=~nosuchuser/runs: there is no home folder ~nosuchuser"):
        expand_user("~nosuchuser/runs", "--workdir")
