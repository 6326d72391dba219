"""A text engine for ALFWorld: the output of TextWorld's engine, several hundred times faster.

TextWorld translates the PDDL of a game with a planner at each reset; at each step it parses and deep-copies the grammar and
derives the text of every admissible command. Here a game is read in milliseconds, without the planner: `pddl` finds the actions
that apply, `grammar` reads the grammar, and `text` derives the texts.

A loaded game serves any number of episodes. A state never changes, so an episode is a `State`, and a transition that another
episode has taken before is a dictionary look-up. The episodes of a group share most of their transitions.
"""

import functools
import json
import re
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

from epo_jax.common.errors import UserError
from epo_jax.envs.alfworld.grammar import Symbols, parse_document, parse_symbols
from epo_jax.envs.alfworld.names import entities
from epo_jax.envs.alfworld.pddl import Action, Proposition, read_problem
from epo_jax.envs.alfworld.pddl import Binding as Parameters
from epo_jax.envs.alfworld.text import Binding, Facts, Grammar

MAX_REMEMBERED_STATES = 2000  # per game, a few kB each; further states are correct but not shared
LOADED_GAMES = 32  # per process, 0.2 to 0.6 MB each
NOTHING_HAPPENS = "Nothing happens."


class State:
    """A state of a game; immutable for callers, and shared by episodes.

    Attributes:
        changes: the facts (including TextWorld's negated ones) that actions have made true since the start.
        won: the goal holds in this state.
    """

    __slots__ = ("changes", "transitions", "won")

    def __init__(self, changes: frozenset[Proposition], won: bool):
        self.changes = changes
        self.won = won
        self.transitions: dict[str, tuple[State, str]] = {}


def _negation(name: str) -> str:
    return name[4:] if name.startswith("not_") else "not_" + name


class _Command(NamedTuple):
    """An action that applies, with its parameters."""

    action: Action
    parameters: Parameters
    mapping: Binding


class Game:
    """A game that has been read.

    Args:
        domain, problem: PDDL.
        grammar: text of TextWorld's grammar.

    Attributes:
        start: the state of every new episode.
        intro: what TextWorld prints first (banner, room and task).

    Raises:
        UserError: one of the texts is malformed.
    """

    def __init__(self, domain: str, problem: str, grammar: str):
        self._problem = read_problem(domain, problem)
        templates, rules = parse_document(grammar)
        self._facts = {name: dict.fromkeys(sorted(rows)) for name, rows in self._problem.facts.items()}
        mentioned = sorted({argument for rows in self._facts.values() for row in rows for argument in row})
        types = self._problem.types
        self._grammar = Grammar(rules, entities({name: types[name] for name in mentioned}))
        self._templates, self._feedback, self._mentioned = {}, {}, {}
        for action in self._problem.actions:
            if action.name not in templates:
                raise UserError(f"its grammar has no action {action.name}.")
            template, feedback = map(parse_symbols, templates[action.name])
            self._templates[action.name], self._feedback[action.name] = template, feedback
            names = {name.lstrip("?") for name, _ in action.parameters}
            self._mentioned[action.name] = _mentions(template, names, self._problem.changing)
        self._states: dict[frozenset[Proposition], State] = {}
        self._wording: dict[tuple, str] = {}
        self._commands_of: tuple[State | None, dict[str, _Command]] = (None, {})
        self.start = self._state(frozenset())
        self.intro = self._grammar.derive(parse_symbols("#intro#"), {}, self._facts_at(self.start.changes))

    def step(self, state: State, command: str) -> tuple[State, str]:
        """Returns the state after `command`, and the feedback; an inadmissible command does not change the state."""
        transition = state.transitions.get(command)
        if transition is None:
            known = self._commands(state).get(command)
            if known is None:
                return state, NOTHING_HAPPENS
            transition = self._apply(state, known)
            if len(self._states) < MAX_REMEMBERED_STATES:
                state.transitions[command] = transition
        return transition

    def admissible(self, state: State) -> list[str]:
        """Returns the admissible commands in `state`, sorted."""
        return sorted(self._commands(state))

    def _state(self, changes: frozenset[Proposition]) -> State:
        state = self._states.get(changes)
        if state is None:
            state = State(changes, any(True for _ in self._problem.goal({}, self._facts_at(changes))))
            if len(self._states) < MAX_REMEMBERED_STATES:
                self._states[changes] = state
        return state

    def _facts_at(self, changes: frozenset[Proposition]) -> Facts:
        """Returns a function from a predicate to its facts after these changes, sorted; computed lazily."""

        @functools.cache
        def facts(predicate: str) -> Set[tuple[str, ...]]:
            base, negation = self._facts.get(predicate, {}), _negation(predicate)
            added = {arguments for name, arguments in changes if name == predicate}
            removed = {arguments for name, arguments in changes if name == negation}
            return (dict.fromkeys(sorted((base.keys() - removed) | added)) if added or removed else base).keys()

        return facts

    def _apply(self, state: State, command: _Command) -> tuple[State, str]:
        added, deleted = command.action.outcome(command.parameters, self._facts_at(state.changes))
        new = added | {(_negation(name), arguments) for name, arguments in deleted}
        old = {(_negation(name), arguments) for name, arguments in new}
        after = self._state((state.changes - old) | new)
        feedback = self._feedback[command.action.name]
        return after, self._grammar.derive(feedback, command.mapping, self._facts_at(after.changes))

    def _commands(self, state: State) -> dict[str, _Command]:
        """Returns the commands that apply; of actions with the same text, the first, as in TextWorld."""
        if self._commands_of[0] is state:
            return self._commands_of[1]
        facts = self._facts_at(state.changes)
        commands: dict[str, _Command] = {}
        for action in self._problem.actions:
            for found in action.instances(facts):
                mapping = {(name[1:], kind): found[name] for name, kind in action.parameters}
                commands.setdefault(self._word(action, mapping, facts), _Command(action, found, mapping))
        self._commands_of = (state, commands)
        return commands

    def _word(self, action: Action, mapping: Binding, facts: Facts) -> str:
        """Returns the command of an action, such as "open fridge 1"."""
        mentioned = self._mentioned[action.name]
        if mentioned is None:
            return self._grammar.derive(self._templates[action.name], mapping, facts)
        # Actions that differ only in arguments that the command omits (the agent's location) have the same text.
        use = (action.name, *(value for (name, _), value in mapping.items() if name in mentioned))
        if use not in self._wording:
            self._wording[use] = self._grammar.derive(self._templates[action.name], mapping, facts)
        return self._wording[use]


def _mentions(template: Symbols, parameters: Set[str], changing: Set[str]) -> set[str] | None:
    """Returns the parameters that the text of a command depends on, or None if it may depend on the state."""
    mentioned: set[str] = set()
    for kind, content, *rest in template:
        if kind == "rule":
            return None
        if kind == "value":
            mentioned |= parameters & set(re.findall(r"\w+", content))
        for predicate, placeholders in (rest[0] if rest else None) or ():
            names = {name for name, _ in placeholders}
            if predicate in changing or not names <= parameters:
                return None
            mentioned |= names
        if kind in ("each", "list"):
            inside = _mentions([content], parameters, changing)
            if inside is None:
                return None
            mentioned |= inside
    return mentioned


@functools.lru_cache(maxsize=LOADED_GAMES)
def load_game(path: str) -> Game:
    """Loads the game in file `path`; the last few games stay in memory.

    Raises:
        UserError: the file is missing, is no game file, or cannot be played.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the game file {path}: {error.strerror}; restore the data.") from None
    try:
        return read_game(content)
    except UserError as error:
        raise UserError(f"the game file {path} cannot be played: {error}") from None


def read_game(content: bytes) -> Game:
    """Reads the content of a game file. Raises UserError if it is malformed."""
    try:
        data = json.loads(content)
        required = ("pddl_domain", "pddl_problem", "grammar")
        if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in required):
            raise UserError(f"it lacks one of the texts {', '.join(required)}.")
        return Game(*(data[key] for key in required))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{type(error).__name__}: {error}; restore the data.") from None
