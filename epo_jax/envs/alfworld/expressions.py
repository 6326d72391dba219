"""The expressions of a game's grammar: a small, safe evaluator.

TextWorld evaluates them as Python, so there a game file is code. Here an expression may only read a field of a variable, join
strings and choose with `or` / `and`; everything else is an error.
"""

import ast
import functools
from collections.abc import Callable
from typing import Any

from epo_jax.common.errors import UserError

_FIELDS = ("id", "name", "type", "definite", "indefinite")


@functools.cache
def compile_expression(expression: str) -> Callable[[dict[str, dict[str, str]]], Any]:
    """Compiles an expression to a function of the variables in scope, {name: {field: text}}.

    Raises:
        UserError: the expression contains anything but fields of variables, strings, +, `or` and `and`.
    """
    try:
        return _compile_node(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"its grammar holds the expression {expression!r}, which is not allowed: {error}.") from None


def _compile_node(node: ast.expr) -> Callable[[dict[str, dict[str, str]]], Any]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        value = node.value
        return lambda scope: value
    if isinstance(node, ast.Name):  # `{o}` in a template is the object, printed as its name
        name = node.id
        return lambda scope: scope[name]["name"]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in _FIELDS:
        name, field = node.value.id, node.attr
        return lambda scope: scope[name][field]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _compile_node(node.left), _compile_node(node.right)
        return lambda scope: left(scope) + right(scope)
    if isinstance(node, ast.BoolOp):
        parts = [_compile_node(value) for value in node.values]
        return functools.partial(_first, parts, isinstance(node.op, ast.Or))
    raise ValueError("only fields of variables, strings, + and or/and may be used")


def _first(parts: list[Callable], stop_at: bool, scope: dict[str, dict[str, str]]) -> Any:
    """Python's `or` (`stop_at` is True) or `and` (False)."""
    for part in parts:
        value = part(scope)
        if bool(value) == stop_at:
            break
    return value
