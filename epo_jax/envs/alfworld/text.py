"""The texts of an ALFWorld game: a small, safe evaluator for TextWorld's context-sensitive grammar.

A game file contains its grammar, whose expressions TextWorld evaluates as Python: a game file is code. Here TextWorld's parser
parses the grammar once into plain JSON, and the evaluator walks that tree. Expressions may only read a field of a variable,
join strings and choose with `or` / `and`; everything else is an error. The result equals TextWorld's text in every character.

The tree: a list of symbols, each one of
    ["text", literal]      ["rule", name]      ["value", expression]
    ["each", symbol, query or None]            ["list", symbol]
where a query is a conjunction [[predicate, [[placeholder, type], ...]], ...].
"""

import ast
import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from epo_jax.common.errors import UserError

# The grammars of games differ in one sentence. If it is plain words, one parse (0.12 s) serves all games.
_PLAIN_GOAL = re.compile(r'"rhs": "Your task is to: ([A-Za-z0-9 ,\'-]+)')
_GOAL_MARK = "GOAL OF THE GAME"

Symbols = list[list[Any]]
Binding = dict[tuple[str, str], str]  # (placeholder, type) -> object id
Facts = Callable[[str], list[tuple[str, ...]]]  # predicate -> its true argument tuples, sorted

MAX_SYMBOLS = 50_000  # of one text; the longest of the real grammar needs about a thousand
_FIELDS = ("id", "name", "type", "definite", "indefinite")
_ROOT_TYPE = "object"  # every PDDL type is a subtype of it


def parse_document(text: str) -> tuple[dict[str, list[str]], dict[str, list[list[Any]]]]:
    """Parses the `grammar` text of a game file with TextWorld's parser.

    Returns:
        actions: name (lower case) -> [command template, name of the feedback symbol].
        rules: symbol -> [[condition query or None, symbols], ...] in order of preference.
    """
    goal = _PLAIN_GOAL.search(text)
    if goal is None:
        return _parse_document(text)
    actions, rules = _parse_document(text[: goal.start(1)] + _GOAL_MARK + text[goal.end(1) :])
    task = json.loads(json.dumps(rules["task"]).replace(_GOAL_MARK, goal.group(1)))
    return actions, {**rules, "task": task}


@functools.lru_cache(maxsize=4)
def _parse_document(text: str) -> tuple[dict[str, list[str]], dict[str, list[list[Any]]]]:
    from textworld.envs.pddl import logic

    actions, grammar = logic._parse_and_convert(text, rule_name="pddlStart")
    rules = {
        name: [[parse_query(rule.condition) if rule.condition else None, _symbols(rule.rhs)] for rule in alternatives]
        for name, alternatives in grammar._rules.items()
    }
    return {name: [action.template, action.feedback_rule] for name, action in actions.items()}, rules


def parse_symbols(text: str) -> Symbols:
    """Parses a right-hand side, such as a command template, with TextWorld's parser."""
    from textworld.envs.pddl import textgen

    return _symbols(textgen._parse_and_convert(text, rule_name="symbols"))


@functools.cache
def parse_query(text: str) -> list[list[Any]]:
    """Parses `p(a:type, b) & q(b)` with TextWorld's parser."""
    from textworld.logic import Rule

    conditions = Rule.parse_conjunctive_query(text).preconditions
    return [[predicate.name, [[ph.name, ph.type] for ph in predicate.parameters]] for predicate in conditions]


def _symbols(symbols) -> Symbols:
    return [_symbol(symbol) for symbol in symbols]


def _symbol(symbol) -> list[Any]:
    kind = type(symbol).__name__
    if kind == "TerminalSymbol":
        return ["text", str(symbol.symbol)]
    if kind == "NonterminalSymbol":
        return ["rule", str(symbol.symbol)]
    if kind == "EvalSymbol":
        compile_expression(symbol.expression)
        return ["value", symbol.expression]
    if kind == "ConditionalSymbol":
        return ["each", _symbol(symbol.expression), parse_query(symbol.given) if symbol.given else None]
    return ["list", _symbol(symbol.symbol)]


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


def solve(query: list[list[Any]], binding: Binding, facts: Facts, types: dict[str, str]) -> Iterator[Binding]:
    """Yields all extensions of `binding` for which every predicate of `query` holds, in TextWorld's order.

    As in TextWorld, no two placeholders are bound to the same object.
    """
    if not query:
        yield binding
        return
    (predicate, placeholders), rest = query[0], query[1:]
    for arguments in facts(predicate):
        extended = dict(binding)
        for (name, type_), value in zip(placeholders, arguments, strict=True):
            bound = extended.get((name, type_))
            if bound is None:
                if value in extended.values() or type_ not in (types[value], _ROOT_TYPE):
                    break
                extended[name, type_] = value
            elif bound != value:
                break
        else:
            yield from solve(rest, extended, facts, types)


class Grammar:
    """The rules of a game, which derive text from facts.

    Args:
        rules: as from `parse_document`.
        entities: object id -> its fields {id, name, type, definite, indefinite}.
    """

    def __init__(self, rules: dict[str, list[list[Any]]], entities: dict[str, dict[str, str]]):
        self._rules = rules
        self._entities = entities
        self._types = {key: entity["type"] for key, entity in entities.items()}
        self._left = 0

    def derive(self, symbols: Symbols, binding: Binding, facts: Facts) -> str:
        """Derives the text of `symbols` from a binding of placeholders and facts.

        Raises:
            UserError: no rule fits, or the derivation does not end.
        """
        self._left = MAX_SYMBOLS
        try:
            return self._text(symbols, binding, facts)
        except RecursionError:
            raise UserError("the game's grammar has no end.") from None

    def _text(self, symbols: Symbols, binding: Binding, facts: Facts) -> str:
        return "".join(self._derive(symbol, binding, facts) for symbol in symbols)

    def _derive(self, symbol: list[Any], binding: Binding, facts: Facts) -> str:
        self._left -= 1
        if self._left < 0:
            raise UserError("the game's grammar has no end.")
        kind, content = symbol[0], symbol[1]
        if kind == "text":
            return content
        if kind == "value":
            return str(compile_expression(content)({name: self._entities[v] for (name, _), v in binding.items()}))
        if kind == "rule":
            return self._text(self._choose(content, binding, facts), binding, facts)
        if kind == "each":
            return "".join(self._each(symbol, binding, facts))
        return self._join(self._each(content, binding, facts), binding, facts)

    def _choose(self, name: str, binding: Binding, facts: Facts) -> Symbols:
        for condition, symbols in self._rules.get(name, ()):
            if condition is None or any(True for _ in solve(condition, binding, facts, self._types)):
                return symbols
        raise UserError(f"the game's grammar has no rule that fits #{name}#.")

    def _each(self, symbol: list[Any], binding: Binding, facts: Facts) -> list[str]:
        _, expression, query = symbol
        if query is None:
            return [self._derive(expression, binding, facts)]
        return [self._derive(expression, bound, facts) for bound in solve(query, binding, facts, self._types)]

    def _join(self, items: list[str], binding: Binding, facts: Facts) -> str:
        if len(items) < 2:
            return items[0] if items else self._derive(["rule", "list_empty"], binding, facts)
        separator = self._derive(["rule", "list_separator"], binding, facts)
        last = self._derive(["rule", "list_last_separator"], binding, facts)
        return separator.join(items[:-1]) + last + items[-1]
