"""The expressions of a grammar: what they may read, and what is refused."""

import pytest

from epo_jax.common.errors import UserError
from epo_jax.envs.alfworld import expressions

FORK = {"id": "fork", "name": "fork 1", "type": "object", "definite": "the", "indefinite": "a"}


@pytest.mark.parametrize(
    "expression, value",
    [
        ("o", "fork 1"),
        ("o.name or o.id", "fork 1"),
        ("o.empty or o.id", "fork"),
        ("o.name and 'x'", "x"),
        ("'a' + o.id", "afork"),
    ],
)
def test_expressions_are_pythons(expression, value, monkeypatch):
    monkeypatch.setattr(expressions, "_FIELDS", ("id", "name", "empty"))
    scope = {"o": {**FORK, "empty": ""}}
    assert expressions.compile_expression.__wrapped__(expression)(scope) == value


@pytest.mark.parametrize("expression", ["1", "o.x", "o.name.x", "print(o)", "o['name']", "o if o else o", "o -", "-o.name"])
def test_other_expressions_are_refused(expression):
    with pytest.raises(UserError, match="not allowed"):
        expressions.compile_expression(expression)
