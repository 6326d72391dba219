"""Reads the `grammar` of a game file: TextWorld's context-sensitive grammar, as JSON values.

A document has actions, each with a command template and the symbol of its feedback, and grammars in JSON, whose rules derive
texts. A right-hand side is a list of symbols, each one of

    ["text", literal]      ["rule", name]      ["value", expression]
    ["each", symbol, query or None]            ["list", symbol]

where a query is a conjunction [[predicate, [[placeholder, type], ...]], ...]. In the text they are `literal`, `#name#`,
`{expression}`, `{expression | query}` or `{#name# | query}`, and `[{...}]`.
"""

import functools
import json
import re
from typing import Any

from epo_jax.common.errors import UserError
from epo_jax.envs.alfworld.expressions import compile_expression

Symbols = list[list[Any]]
Query = list[list[Any]]
Rules = dict[str, list[list[Any]]]

# The grammars of games differ in one sentence. If it is plain words, one parse serves all games.
_PLAIN_GOAL = re.compile(r'"rhs": "Your task is to: ([A-Za-z0-9 ,\'-]+)')
_GOAL_MARK = "GOAL OF THE GAME"

_WORD = r"[\w/-]+"
_TOKEN = re.compile(rf'\s+|\#[^\n]*|("""(?s:.*?)"""|"[^"]*"|::|[{{}};]|{_WORD})')
_NAME = re.compile(r"#([\w()/!<>\-\s,.]+)#")
_TEXT = re.compile(r'[^;|"<>\[\]#{}]+')
_QUOTED = re.compile(r'"([^;|"<>\[\]#{}]*)"')
_EACH = re.compile(r"\{\s*(?:#([\w()/!<>\-\s,.]+)#|([^|\[\]{}\n<>]+?))\s*(?:\|\s*([^;|{}\n\[\]#]+))?\}")
_PREDICATE = re.compile(r"\s*(\w+)\s*\(\s*([^()]*)\)\s*(?:&|$)")


def parse_document(text: str) -> tuple[dict[str, list[str]], Rules]:
    """Parses the `grammar` text of a game file.

    Returns:
        actions: name (lower case) -> [command template, feedback], both right-hand sides.
        rules: symbol -> [[condition query or None, symbols], ...] in order of preference.

    Raises:
        UserError: it is malformed.
    """
    goal = _PLAIN_GOAL.search(text)
    if goal is None:
        return _parse_document(text)
    actions, rules = _parse_document(text[: goal.start(1)] + _GOAL_MARK + text[goal.end(1) :])
    task = json.loads(json.dumps(rules["task"]).replace(_GOAL_MARK, goal.group(1)))
    return actions, {**rules, "task": task}


@functools.lru_cache(maxsize=4)
def _parse_document(text: str) -> tuple[dict[str, list[str]], Rules]:
    tokens, actions, blocks = _tokens(text), {}, {}

    def expect(word: str) -> None:
        if (found := next(tokens, "its end")) != word:
            raise UserError(f"its grammar has {found[:40]} in place of {word}.")

    def field() -> str:
        expect("::")
        value = next(tokens, "")
        expect(";")
        return value.strip('"')

    for keyword in tokens:
        if keyword == "grammar":
            blocks |= json.loads(field())
        elif keyword == "action":
            name, fields = next(tokens, ""), {}
            expect("{")
            while (key := next(tokens, "its end")) in ("template", "feedback", "grammar", "pddl"):
                fields[key] = field()
            if key != "}" or not {"template", "feedback"} <= fields.keys():
                raise UserError(
                    f"its grammar has no whole action {name!r}: {key[:40]} in place of template, feedback or grammar."
                )
            actions[name.lower()] = [fields["template"], fields["feedback"]]
            lines = [line for line in fields.get("grammar", "{}").split("\n") if not line.lstrip().startswith("#")]
            blocks |= json.loads("\n".join(lines))
        else:
            raise UserError(f"its grammar has {keyword[:40]} in place of an action or a grammar.")
    rules = {
        name: [[parse_query(rule["condition"]) if rule.get("condition") else None, parse_symbols(rule["rhs"])] for rule in ways]
        for name, ways in blocks.items()
    }
    return actions, rules


def _tokens(text: str):
    place = 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise UserError(f"its grammar cannot be read at {text[place : place + 40]!r}.")
        place = found.end()
        if found.group(1):
            yield found.group(1)


def parse_symbols(text: str) -> Symbols:
    """Parses a right-hand side, such as a command template, up to a character that cannot be read, as TextWorld does.

    Raises:
        UserError: it has an expression that is not allowed.
    """
    text = text.lstrip()  # blanks inside are kept
    symbols: Symbols = []
    place = 0
    while place < len(text):
        listed = text[place] == "["
        if found := _EACH.match(text, place + listed):
            name, expression, query = found.groups()
            inner = ["rule", name] if name else ["value", expression]
            symbol = ["each", inner, parse_query(query) if query else None]
            if expression:
                compile_expression(expression)
            closed = text[found.end() : found.end() + 1] == "]"
            if not listed or closed:
                symbols.append(["list", symbol] if listed else symbol)
                place = found.end() + listed
                continue
        elif found := _NAME.match(text, place):
            symbols.append(["rule", found.group(1)])
            place = found.end()
            continue
        elif found := _QUOTED.match(text, place) or _TEXT.match(text, place):
            symbols.append(["text", found.group(found.lastindex or 0)])
            place = found.end()
            continue
        break
    return symbols


@functools.cache
def parse_query(text: str) -> Query:
    """Parses `p(a:type, b) & q(b)`; the type of a placeholder without one is its name.

    Raises:
        UserError: it is malformed.
    """
    query, place = [], 0
    while place < len(text):
        found = _PREDICATE.match(text, place)
        if found is None:
            raise UserError(f"its grammar has the condition {text!r}, which is no conjunction of predicates.")
        name, arguments = found.groups()
        pairs = [argument.split(":") for argument in arguments.split(",") if argument.strip()]
        query.append([name, [[pair[0].strip(), pair[-1].strip()] for pair in pairs]])
        place = found.end()
    return query
