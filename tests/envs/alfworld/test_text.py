"""The grammar evaluator on worked examples."""

import json

import pytest

from epo_jax.common.errors import UserError
from epo_jax.envs.alfworld import text as evaluator
from epo_jax.envs.alfworld.grammar import parse_document, parse_query, parse_symbols

TYPES = {"fork": "object", "spoon": "object", "desk": "receptacle", "bed": "receptacle"}
ENTITIES = {
    name: {"id": name, "name": f"{name} 1", "type": type_, "definite": "the", "indefinite": "a"} for name, type_ in TYPES.items()
}
RULES = {
    "list_empty": [[None, [["text", "nothing"]]]],
    "list_separator": [[None, [["text", ", "]]]],
    "list_last_separator": [[None, [["text", ", and "]]]],
    "state": [
        [parse_query("on(o:object, r:receptacle)"), [["text", "full"]]],
        [None, [["text", "empty"]]],
    ],
}


def facts(**known):
    return lambda predicate: sorted(known.get(predicate, []))


def solutions(query, mapping, known):
    found = evaluator.solve(parse_query(query), mapping, known, TYPES)
    return [tuple(solution.values()) for solution in found]


def test_a_query_is_solved_in_the_order_of_its_facts():
    known = facts(on=[("spoon", "desk"), ("fork", "desk"), ("fork", "bed")])
    assert solutions("on(o:object, r:receptacle)", {}, known) == [("fork", "bed"), ("fork", "desk"), ("spoon", "desk")]
    assert solutions("on(o:object, r:receptacle)", {("r", "receptacle"): "desk"}, known) == [
        ("desk", "fork"),
        ("desk", "spoon"),
    ]


def test_two_placeholders_never_stand_for_the_same_thing():
    known = facts(near=[("desk", "desk"), ("bed", "desk")])
    assert solutions("near(a:receptacle, b:receptacle)", {}, known) == [("bed", "desk")]
    assert solutions("near(a:receptacle, b:receptacle)", {("z", "receptacle"): "bed"}, known) == []


def test_a_type_keeps_others_out_and_the_root_type_none():
    known = facts(seen=[("desk",), ("fork",)])
    assert solutions("seen(o:receptacle)", {}, known) == [("desk",)]
    assert solutions("seen(o:object)", {}, known) == [("desk",), ("fork",)]


def test_conjunctions_bind_from_left_to_right():
    known = facts(on=[("fork", "desk"), ("spoon", "bed")], open=[("bed",)])
    assert solutions("on(o:object, r:receptacle) & open(r:receptacle)", {}, known) == [("spoon", "bed")]


@pytest.mark.parametrize(
    "on, text",
    [
        ([], "nothing"),
        ([("fork", "desk")], "a fork 1"),
        ([("fork", "desk"), ("spoon", "desk")], "a fork 1, and a spoon 1"),
        ([("bed", "desk"), ("fork", "desk"), ("spoon", "desk")], "a bed 1, a fork 1, and a spoon 1"),
    ],
)
def test_lists_are_joined_as_textworld_joins_them(on, text):
    grammar = evaluator.Grammar(RULES, ENTITIES)
    symbols = parse_symbols("[{o.indefinite + ' ' + o.name | on(o:object, r:receptacle)}].")
    assert grammar.derive(symbols, {("r", "receptacle"): "desk"}, facts(on=on)) == f"{text}."


def test_the_first_rule_whose_condition_holds_is_used():
    grammar = evaluator.Grammar(RULES, ENTITIES)
    symbols = parse_symbols("The {r.name} is #state#.")
    mapping = {("r", "receptacle"): "desk"}
    assert grammar.derive(symbols, mapping, facts(on=[("fork", "desk")])) == "The desk 1 is full."
    assert grammar.derive(symbols, mapping, facts(on=[("fork", "bed")])) == "The desk 1 is empty."


def test_an_unknown_symbol_is_an_error():
    with pytest.raises(UserError, match="#nowhere#"):
        evaluator.Grammar(RULES, ENTITIES).derive([["rule", "nowhere"]], {}, facts())


@pytest.mark.parametrize("goal", ["put a mug in desk", "it's 2 pens, really", "put a mug (blue) & go!"])
def test_the_goal_reaches_the_rules_whether_or_not_it_is_plain_words(goal):
    rules = {"task": [{"rhs": f"Your task is to: {goal}."}], "intro": [{"rhs": "#task#"}]}
    _, parsed = parse_document(f'grammar :: """\n{json.dumps(rules)}\n""";\n')
    intro = evaluator.Grammar(parsed, {}).derive([["rule", "intro"]], {}, facts())
    assert intro == f"Your task is to: {goal}."
