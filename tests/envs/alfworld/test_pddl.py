"""PDDL against a solver that grounds everything and evaluates conditions as they are written."""

import itertools
import random

import pytest

from epo_jax.common.errors import UserError
from epo_jax.envs.alfworld import pddl

DOMAIN = """
; a comment (with parentheses
(define (domain Small)
  (:requirements :adl)
  (:types thing place - object cup - thing)
  (:constants HOME - place)
  (:predicates (at ?t - thing ?p - place) (near ?p ?q) (full ?c - cup) (open ?p) (wet ?t))
  (:action Move :parameters (?t - thing ?p ?q - place)
    :precondition (and (at ?t ?p) (or (near ?p ?q) (= ?q HOME)) (not (= ?t cup3)))
    :effect (and (not (at ?t ?p)) (at ?t ?q) (increase (total-cost) 1)))
  (:action Fill :parameters (?c - cup)
    :precondition (and (not (full ?c)) (exists (?p - place) (and (at ?c ?p) (open ?p))))
    :effect (and (full ?c) (when (exists (?p - place) (and (at ?c ?p) (near ?p ?p))) (wet ?c))))
  (:action Spill :parameters (?c - cup ?p - place)
    :precondition (and (full ?c) (at ?c ?p) (forall (?d - cup) (imply (at ?d ?p) (full ?d))))
    :effect (and (not (full ?c)) (forall (?t - thing) (when (at ?t ?p) (wet ?t)))))
  (:action Wait :parameters (?p - place) :precondition () :effect (and (open ?p)))
)
"""
THINGS = {"box": "thing", "cup1": "cup", "cup2": "cup", "cup3": "cup", "home": "place", "yard": "place", "pond": "place"}
GOAL = "(:goal (and (exists (?c ?d - cup) (and (not (= ?c ?d)) (wet ?c) (at ?d yard))) (forall (?p - place) (open ?p))))"
PARAMETERS = {"move": ("thing", "place", "place"), "fill": ("cup",), "spill": ("cup", "place"), "wait": ("place",)}


def draw(rng):
    places = [name for name, kind in THINGS.items() if kind == "place"]
    facts = {("at", (thing, rng.choice(places))) for thing, kind in THINGS.items() if kind != "place"}
    facts |= {("near", pair) for pair in itertools.product(places, places) if rng.random() < 0.4}
    facts |= {("open", (place,)) for place in places if rng.random() < 0.5}
    return facts | {("full", (cup,)) for cup in ("cup1", "cup2", "cup3") if rng.random() < 0.5}


def problem_of(facts):
    objects = " ".join(f"{name} - {kind}" for name, kind in THINGS.items() if name != "home")
    init = " ".join(f"({name} {' '.join(arguments)})" for name, arguments in sorted(facts))
    return pddl.read_problem(DOMAIN, f"(define (problem p) (:domain small) (:objects {objects}) (:init (= (c) 0) {init}) {GOAL})")


def lookup(facts):
    return lambda predicate: {arguments: None for name, arguments in sorted(facts) if name == predicate}.keys()


def of(kind):
    return [name for name, own in THINGS.items() if kind in (own, "object") or (kind == "thing" and own == "cup")]


def by_hand(facts):
    """{(action, arguments): (added, deleted)} of every action that applies and changes something."""

    def at(t, p):
        return ("at", (t, p)) in facts

    def near(p, q):
        return ("near", (p, q)) in facts

    moves = {}
    for t, p, q in itertools.product(of("thing"), of("place"), of("place")):
        if at(t, p) and (near(p, q) or q == "home") and t != "cup3" and p != q:
            moves["move", (t, p, q)] = ({("at", (t, q))}, {("at", (t, p))})
    for c in of("cup"):
        if ("full", (c,)) not in facts and any(at(c, p) and ("open", (p,)) in facts for p in of("place")):
            wet = {("wet", (c,))} if any(at(c, p) and near(p, p) for p in of("place")) else set()
            moves["fill", (c,)] = ({("full", (c,))} | wet, set())
    for c, p in itertools.product(of("cup"), of("place")):
        if ("full", (c,)) in facts and at(c, p) and all(("full", (d,)) in facts for d in of("cup") if at(d, p)):
            moves["spill", (c, p)] = ({("wet", (t,)) for t in of("thing") if at(t, p)}, {("full", (c,))})
    for p in of("place"):
        moves["wait", (p,)] = ({("open", (p,))}, set())
    return moves


def test_applicable_actions_outcomes_and_goal_are_those_of_full_grounding():
    rng, won = random.Random(0), 0
    for _ in range(40):
        facts = draw(rng)
        for _ in range(8):
            problem = problem_of(facts)
            found = {}
            for action in problem.actions:
                for binding in action.instances(lookup(facts)):
                    arguments = tuple(binding[name] for name, _ in action.parameters)
                    found[action.name, arguments] = action.outcome(binding, lookup(facts))
            expected = by_hand(facts)
            assert found == expected
            goal = any(("wet", (c,)) in facts and ("at", (d, "yard")) in facts and c != d
                       for c, d in itertools.product(of("cup"), of("cup")))  # fmt: skip
            goal = goal and all(("open", (p,)) in facts for p in of("place"))
            assert any(True for _ in problem.goal({}, lookup(facts))) == goal
            won += goal
            added, deleted = expected[rng.choice(sorted(expected))]
            facts = (facts - deleted) | added
    assert won > 5


def test_facts_are_read_in_lower_case_without_costs():
    problem = problem_of({("at", ("cup1", "home")), ("open", ("pond",))})
    assert problem.facts == {"at": [("cup1", "home")], "open": [("pond",)]}
    assert problem.types == THINGS and problem.changing == {"at", "full", "wet", "open"}


def test_a_type_without_objects_has_no_instances():
    """ALFRED's domain has `?l - location,`, with a comma: a type that nothing has."""
    domain = DOMAIN.replace("(exists (?p - place) (and (at ?c ?p) (open ?p)))", "(exists (?p - place, ?q - thing) (at ?c ?p))")
    problem = pddl.read_problem(domain, f"(define (problem p) (:objects cup1 - cup) (:init (at cup1 home)) {GOAL})")
    facts = {("at", ("cup1", "home"))}
    assert {action.name for action in problem.actions for _ in action.instances(lookup(facts))} == {"wait"}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("(:init", "(:init (", "not one expression"),
        (":init (at", ":init) (at", "a parenthesis too many"),
        ("(at cup1 home)", "(on cup1 home)", r"states \(on cup1 home\)"),
        ("(at cup1 home)", "(at cup1 nowhere)", r"states \(at cup1 nowhere\)"),
        ("(at cup1 home)", "(at cup1)", r"states \(at cup1\)"),
        ("(at cup1 home)", "home", "'home'"),
        (GOAL, "", "no goal"),
        ("(wet ?c)", "(wet ?z)", r"\(wet \?z\), of which it does not declare all"),
        ("(wet ?c)", "(damp ?c)", r"\(damp \?c/\d+\), of which"),
    ],
)
def test_a_malformed_problem_is_refused(old, new, told):
    text = f"(define (problem p) (:objects cup1 - cup) (:init (at cup1 home)) {GOAL})"
    assert old in text
    with pytest.raises(UserError, match=told):
        pddl.read_problem(DOMAIN, text.replace(old, new))
