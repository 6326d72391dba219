"""A text engine for ALFWorld: the output of TextWorld's engine, a few hundred times faster.

TextWorld translates the PDDL of a game twice at each reset; at each step it parses and deep-copies the grammar and derives the
text of every admissible command. Here a game is compiled once, by fast-downward's translator, TextWorld's grammar parser and
ALFWorld's naming of objects, into JSON on disk. Playing imports none of them: the successor function is fast-downward's
compiled library, called through ctypes, and `text` derives the texts.

A loaded game serves any number of episodes. The library numbers the states that it has seen and can return to any of them, so
an episode is a `State`, and a transition that another episode has taken before is a dictionary look-up. The episodes of a group
share most of their transitions.
"""

import functools
import hashlib
import json
import re
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from epo_jax.common.errors import UserError
from epo_jax.common.files import write_to_cache
from epo_jax.envs.alfworld.compile import COMPILER_VERSION, compile_game
from epo_jax.envs.alfworld.library import Atom, Operator, Proposition, borrow, give_back
from epo_jax.envs.alfworld.text import Binding, Facts, Grammar, Symbols

MAX_REMEMBERED_STATES = 2000  # per game, a few kB each; further states are correct but not shared
LOADED_GAMES = 32  # per process, about 3 MB each
NOTHING_HAPPENS = "Nothing happens."


class State:
    """A state of a game; immutable for callers, and shared by episodes.

    Attributes:
        changes: the facts (including TextWorld's negated ones) that actions have made true since the start.
        won: the goal holds in this state.
    """

    __slots__ = ("changes", "number", "transitions", "won")

    def __init__(self, number: int, changes: frozenset[Proposition], won: bool):
        self.number = number
        self.changes = changes
        self.won = won
        self.transitions: dict[str, tuple[State, str]] = {}


def _negation(name: str) -> str:
    return name[4:] if name.startswith("not_") else "not_" + name


class _Command(NamedTuple):
    """An applicable operator and its command."""

    number: int
    action: str
    mapping: Binding
    num_effects: int


class Game:
    """A compiled game, loaded into its own copy of the library.

    Attributes:
        start: the state of every new episode.
        intro: what TextWorld prints first (banner, room and task).
    """

    def __init__(self, compiled: Mapping[str, Any]):
        self._actions = compiled["actions"]
        self._mentioned = {
            name: _mentions(action["template"], {p for p, _ in action["parameters"]}, set(compiled["changing"]))
            for name, action in self._actions.items()
        }
        self._facts = {name: [tuple(row) for row in rows] for name, rows in compiled["facts"].items()}
        self._grammar = Grammar(compiled["rules"], compiled["entities"])
        self._library = borrow()
        weakref.finalize(self, give_back, self._library)
        self._library.load_sas(compiled["sas"].encode())
        self._states: dict[tuple[int, frozenset[Proposition]], State] = {}
        self._wording: dict[str, tuple[str, str, Binding]] = {}
        self._wording_by_use: dict[tuple, str] = {}
        self._commands_of: tuple[State | None, dict[str, _Command]] = (None, {})
        self.start = self._state(frozenset())
        self.intro = self._grammar.derive(compiled["intro"], {}, self._facts_at(self.start))

    def step(self, state: State, command: str) -> tuple[State, str]:
        """Returns the state after `command`, and the feedback; an inadmissible command does not change the state."""
        transition = state.transitions.get(command)
        if transition is None:
            operator = self._commands(state).get(command)
            if operator is None:
                return state, NOTHING_HAPPENS
            transition = self._apply(state, operator)
            if len(self._states) < MAX_REMEMBERED_STATES:
                state.transitions[command] = transition
        return transition

    def admissible(self, state: State) -> list[str]:
        """Returns the admissible commands in `state`, sorted."""
        return sorted(self._commands(state))

    def _state(self, changes: frozenset[Proposition]) -> State:
        """Returns the current state of the library."""
        number = self._library.get_state_id()
        state = self._states.get((number, changes))
        if state is None:
            state = State(number, changes, self._library.check_goal())
            if len(self._states) < MAX_REMEMBERED_STATES:
                self._states[number, changes] = state
        return state

    def _facts_at(self, state: State) -> Facts:
        """Returns a function from a predicate to its facts in `state`, computed lazily."""

        @functools.cache
        def facts(predicate: str) -> list[tuple[str, ...]]:
            base, negation = self._facts.get(predicate, []), _negation(predicate)
            added = {arguments for name, arguments in state.changes if name == predicate}
            removed = {arguments for name, arguments in state.changes if name == negation}
            return sorted((set(base) - removed) | added) if added or removed else base

        return facts

    def _apply(self, state: State, command: _Command) -> tuple[State, str]:
        self._library.set_state_id(state.number)
        effects = (Atom * command.num_effects)()
        self._library.apply_operator(command.number, effects)
        changes = set(state.changes)
        for effect in effects:
            name, arguments = effect.proposition
            changes.discard((_negation(name), arguments))
            changes.add((name, arguments))
        after = self._state(frozenset(changes))
        feedback = self._actions[command.action]["feedback"]
        return after, self._grammar.derive(feedback, command.mapping, self._facts_at(after))

    def _commands(self, state: State) -> dict[str, _Command]:
        """Returns the applicable commands; of operators with the same text, the first, as in TextWorld."""
        if self._commands_of[0] is state:
            return self._commands_of[1]
        self._library.set_state_id(state.number)
        operators = (Operator * self._library.get_applicable_operators_count())()
        self._library.get_applicable_operators(operators)
        commands: dict[str, _Command] = {}
        for operator in operators:
            text, action, mapping = self._word(operator.name, state)
            if text not in commands:
                commands[text] = _Command(operator.id, action, mapping, operator.nb_effect_atoms)
        self._commands_of = (state, commands)
        return commands

    def _word(self, operator: str, state: State) -> tuple[str, str, Binding]:
        """Returns command, action and binding of an operator such as `openobject agent1 loc_1 fridge_1`."""
        if operator in self._wording:
            return self._wording[operator]
        name, *arguments = operator.split()
        action = self._actions[name]
        mapping = {(p, t): argument for (p, t), argument in zip(action["parameters"], arguments, strict=False)}
        mentioned = self._mentioned[name]
        if mentioned is None:
            return self._grammar.derive(action["template"], mapping, self._facts_at(state)), name, mapping
        # Operators that differ only in arguments that the command omits (the agent's location) have the same text.
        use = (name, tuple(value for (p, _), value in mapping.items() if p in mentioned))
        if use not in self._wording_by_use:
            self._wording_by_use[use] = self._grammar.derive(action["template"], mapping, self._facts_at(state))
        self._wording[operator] = (self._wording_by_use[use], name, mapping)
        return self._wording[operator]


def _mentions(template: Symbols, parameters: set[str], changing: set[str]) -> set[str] | None:
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
def load_game(path: str, cache: str) -> Game:
    """Loads the game in file `path`, compiled in folder `cache`; the last few games stay in memory.

    Raises:
        UserError: the file is missing, is no game file, or its problem cannot be translated.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the game file {path}: {error.strerror}; restore the data.") from None
    try:
        return Game(compiled(content, cache))
    except UserError as error:
        raise UserError(f"the game file {path} cannot be played: {error}") from None


def compiled(content: bytes, cache: str) -> dict[str, Any]:
    """Returns the compiled form of a game file, from folder `cache`; compiles it if it is missing."""
    digest = hashlib.sha256(content).hexdigest()[:32]
    target = Path(cache) / digest[:2] / f"{digest}-{COMPILER_VERSION}.json.z"
    stored = _read_compiled(target)
    if stored is not None:
        return stored
    try:
        game = compile_game(_fields(content))
    except (UserError, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # the translator exits the process on some malformed problems
        raise UserError(f"{type(error).__name__}: {error}; restore the data.") from None
    write_to_cache(target, zlib.compress(json.dumps(game).encode()))
    return game


def _fields(content: bytes) -> dict[str, str]:
    data = json.loads(content)
    required = ("pddl_domain", "pddl_problem", "grammar")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in required):
        raise UserError(f"it lacks one of the texts {', '.join(required)}.")
    return data


def _read_compiled(path: Path) -> dict[str, Any] | None:
    """Returns a compiled game, or None if it is missing or damaged."""
    try:
        return json.loads(zlib.decompress(path.read_bytes()))
    except (OSError, zlib.error, ValueError):
        return None
