"""Compiles a game file into the data that the engine needs, with the original packages.

fast-downward's translator grounds the PDDL, TextWorld's parser reads the grammar, and ALFWorld's `Demangler` names objects.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from epo_jax.envs.alfworld.library import Atom, Proposition, borrow, give_back
from epo_jax.envs.alfworld.text import parse_document, parse_symbols

COMPILER_VERSION = 1  # part of the file name of a compiled game; raise it if the result of `compile_game` changes


def compile_game(data: Mapping[str, str]) -> dict[str, Any]:
    """Compiles a game into JSON values. Takes 0.1 to 1 s, and 1 s of imports the first time.

    Args:
        data: a parsed game file: `pddl_domain`, `pddl_problem` and `grammar`, all text.

    Returns:
        sas: the grounded task, as fast-downward's library reads it.
        facts: predicate -> the argument lists for which it holds initially, sorted.
        entities: object id -> the fields that a grammar may use.
        rules, intro: the grammar and its start symbol (`text`).
        actions: PDDL action -> its parameters [[name, type], ...], command template and feedback.
        changing: the predicates that at least one action changes.
    """
    task, sas = _translate(data["pddl_domain"], data["pddl_problem"])
    propositions = _initial_state(sas)
    for atom in task.init:  # an `Assign` (a cost) has no predicate; `=` states that objects differ
        if getattr(atom, "predicate", "=") != "=":
            propositions.add((atom.predicate, tuple(atom.args)))
    facts: dict[str, list[list[str]]] = {}
    for name, arguments in sorted(propositions):
        facts.setdefault(name, []).append(list(arguments))
    templates, rules = parse_document(data["grammar"])
    actions = {
        action.name: {
            "parameters": [[p.name.strip("?"), p.type_name] for p in action.parameters],
            "template": parse_symbols(templates[action.name][0]),
            "feedback": parse_symbols(templates[action.name][1]),
        }
        for action in task.actions
    }
    types = {thing.name: thing.type_name for thing in task.objects}
    mentioned = sorted({argument for _, arguments in propositions for argument in arguments})
    return {
        "sas": sas,
        "facts": facts,
        "entities": _entities({name: types[name] for name in mentioned}),
        "rules": rules,
        "intro": parse_symbols("#intro#"),
        "actions": actions,
        "changing": sorted({effect.literal.predicate for action in task.actions for effect in action.effects}),
    }


def _translate(domain: str, problem: str):
    """Returns fast-downward's task and SAS text of a PDDL problem; its translator changes sys.argv, restored here."""
    from fast_downward.interface import pddl2sas

    argv = sys.argv
    try:
        return pddl2sas(domain, problem)
    finally:
        sys.argv = argv


def _initial_state(sas: str) -> set[Proposition]:
    library = borrow()
    library.load_sas(sas.encode())
    atoms = (Atom * library.get_state_size())()
    library.get_state(atoms)
    give_back(library)
    propositions = {atom.proposition for atom in atoms}
    return {proposition for proposition in propositions if not proposition[0].startswith("not_")}


@contextlib.contextmanager
def package_import():
    """Context for imports of `alfworld`, which would make ~/.cache/alfworld and set ALFWORLD_DATA to it."""
    before = os.environ.get("ALFWORLD_DATA")
    os.environ["ALFWORLD_DATA"] = tempfile.gettempdir()
    try:
        yield
    finally:
        del os.environ["ALFWORLD_DATA"]
        if before is not None:
            os.environ["ALFWORLD_DATA"] = before


def _entities(types: dict[str, str]) -> dict[str, dict[str, str]]:
    """Returns object id -> fields, for objects of these types."""
    with package_import():
        from alfworld.agents.utils.misc import Demangler
        from textworld.generator.game import EntityInfo

    demangler = Demangler(game_infos={key: EntityInfo(key, type_) for key, type_ in types.items()}, shuffle=False)
    return {
        key: {
            "id": key,
            "name": demangler.demangle_alfred_name(key),
            "type": type_,
            "definite": "the",
            "indefinite": "a",
        }
        for key, type_ in types.items()
    }
