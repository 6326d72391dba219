"""The grammar's parser against TextWorld's, and what it does with what it cannot read."""

from pathlib import Path

import pytest

from epo_jax.common.errors import UserError
from epo_jax.envs.alfworld import grammar
from epo_jax.envs.alfworld.rooms import constants

RIGHT_HAND_SIDES = [
    "go to [{r.name | at(r:receptacle, l:location)}]",
    " (it is open)",
    "\n  Commands:\n  look: x\n",
    "{o.indefinite} {o.name} (in/on the {r.name})} dropped",
    "#a##b# . #overview(o, r)# ",
    "[{#overview(r)# | p(r:receptacle, l:location)}], x",
    "{ r.name }",
    "{r.name | p(r)}",
    "a\tb",
    "x {r}\n{o}\n\n  y",
    "{'a' + o.name}{o.name|p(o:object) & not_q(o:object, x) }",
    "#x#\n\n#y#",
    '"quoted" text',
]


def textworlds(symbols):
    """TextWorld's symbols as ours; blanks around an expression mean nothing."""
    return [textworlds_symbol(symbol) for symbol in symbols]


def textworlds_symbol(symbol):
    from textworld.logic import Rule

    match type(symbol).__name__:
        case "TerminalSymbol":
            return ["text", symbol.symbol]
        case "NonterminalSymbol":
            return ["rule", symbol.symbol]
        case "EvalSymbol":
            return ["value", symbol.expression.strip()]
        case "ListSymbol":
            return ["list", textworlds_symbol(symbol.symbol)]
    query = Rule.parse_conjunctive_query(symbol.given).preconditions if symbol.given else None
    pairs = query and [[p.name, [[ph.name, ph.type] for ph in p.parameters]] for p in query]
    return ["each", textworlds_symbol(symbol.expression), pairs]


@pytest.mark.parametrize("text", RIGHT_HAND_SIDES)
def test_a_right_hand_side_is_read_as_textworld_reads_it(text):
    from textworld.envs.pddl import textgen

    expected = textworlds(textgen._parse_and_convert(text, rule_name="symbols"))
    assert [symbol for symbol in grammar.parse_symbols(text) if symbol != ["text", ""]] == [
        symbol for symbol in expected if symbol != ["text", ""]
    ]


def test_alfworlds_grammar_is_read_as_textworld_reads_it():
    from textworld.envs.pddl import logic

    text = (Path(constants().__file__).parents[1] / "data" / "alfred.twl2").read_text()
    theirs_actions, theirs = logic._parse_and_convert(text, rule_name="pddlStart")
    actions, rules = grammar.parse_document(text)
    assert actions == {name: [action.template, action.feedback_rule] for name, action in theirs_actions.items()}
    assert rules.keys() == theirs._rules.keys() and len(rules) > 30
    for name, ways in theirs._rules.items():
        conditions = [grammar.parse_query(way.condition) if way.condition else None for way in ways]
        expected = [[condition, textworlds(way.rhs)] for condition, way in zip(conditions, ways, strict=True)]
        assert [[c, [s for s in symbols if s != ["text", ""]]] for c, symbols in rules[name]] == [
            [c, [s for s in symbols if s != ["text", ""]]] for c, symbols in expected
        ], name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("grammar :", "cannot be read at ':'"),
        ('grammar :: """{}"""', "its end in place of ;"),
        ("rules {}", "rules in place of an action"),
        ('action a { template :: "b"; }', "no whole action 'a'"),
        ('action a { template :: "b"; feedback :: "c"; verb :: "d"; }', "verb in place of template"),
    ],
)
def test_a_malformed_document_is_refused(text, told):
    with pytest.raises(UserError, match=told):
        grammar.parse_document(text)


def test_a_condition_that_is_no_conjunction_is_refused():
    with pytest.raises(UserError, match="no conjunction"):
        grammar.parse_query("p(a) | q(b)")
