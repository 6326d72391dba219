"""PDDL: reads a domain and a problem, and finds the actions that apply in a state.

It supports what ALFRED's domain and goals use, and a little more: types, `and`, `or`, `not`, `imply`, `exists`, `forall` and `=`
in conditions; `and`, `not`, `when` and `forall` in effects. Costs are skipped.

Actions are not grounded. A condition becomes a `Search`, which joins the facts of a state, rarest predicates first. The agent is
at one location and holds at most one object, so few bindings are tried. Reading a game takes milliseconds; fast-downward, which
grounds every action in advance, needs a tenth of a second for a compact room and seconds for a whole one.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, NamedTuple

from epo_jax.common.errors import UserError

Proposition = tuple[str, tuple[str, ...]]  # predicate, arguments
Facts = Callable[[str], Set[tuple[str, ...]]]  # predicate -> the argument tuples for which it holds
Binding = dict[str, str]  # variable or parameter -> object
Search = Callable[[Binding, Facts], Iterator[Binding]]  # extensions of a binding for which a condition holds
Expression = Any  # a word, or a list of expressions

_TOKEN = re.compile(r"[()]|[^\s()]+")
_ROOT_TYPE = "object"  # every type is a subtype of it


class Effect(NamedTuple):
    """What an action adds (or, if `negated`, deletes) for every binding that `search` finds."""

    search: Search
    negated: bool
    predicate: str
    terms: tuple[str, ...]


class Action(NamedTuple):
    """An action of a problem.

    Attributes:
        parameters: (variable, type) of each.
        search: finds the bindings of all parameters for which the precondition holds.
        required: the facts (predicate, terms) that the precondition names.
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    search: Search
    required: frozenset[tuple[str, tuple[str, ...]]]
    effects: tuple[Effect, ...]

    def instances(self, facts: Facts) -> Iterator[Binding]:
        """Yields the bindings with which the action applies in a state and may change it."""
        for binding in self.search({}, facts):
            required = {(predicate, _ground(terms, binding)) for predicate, terms in self.required}
            added, deleted = self.outcome(binding, facts)
            # "Go to the fridge" in front of the fridge is no action, although its precondition holds.
            if deleted or not added <= required:
                yield binding

    def outcome(self, binding: Binding, facts: Facts) -> tuple[set[Proposition], set[Proposition]]:
        """Returns the propositions that the action adds and deletes; what it adds, it does not delete."""
        added: set[Proposition] = set()
        deleted: set[Proposition] = set()
        for effect in self.effects:
            for bound in effect.search(binding, facts):
                (deleted if effect.negated else added).add((effect.predicate, _ground(effect.terms, bound)))
        return added, deleted - added


class Problem(NamedTuple):
    """A domain and a problem.

    Attributes:
        types: object -> its type.
        facts: predicate -> the argument tuples for which it holds initially.
        goal: finds a binding if the goal holds.
        changing: the predicates that at least one action changes.
    """

    types: dict[str, str]
    facts: dict[str, list[tuple[str, ...]]]
    actions: tuple[Action, ...]
    goal: Search
    changing: frozenset[str]


def read_problem(domain: str, problem: str) -> Problem:
    """Reads the texts of a domain and of a problem; names are lower-cased.

    Raises:
        UserError: they are malformed, or use what is not supported.
    """
    parent, constants, predicates, schemas = _read_domain(domain)
    sections = _sections(problem)
    types = {**constants, **dict(_typed(sections.get(":objects", [[]])[0]))}
    facts: dict[str, list[tuple[str, ...]]] = {}
    for fact in sections.get(":init", [[]])[0]:
        name, *arguments = _words(fact) if "=" not in fact else ["="]
        if name == "=":  # a cost
            continue
        if predicates.get(name) != len(arguments) or not types.keys() >= set(arguments):
            raise UserError(f"its problem states ({' '.join(fact)}), which its domain and objects do not define.")
        facts.setdefault(name, []).append(tuple(arguments))
    sizes = {name: len(rows) for name, rows in facts.items()}
    planner = _Planner(_objects_by_type(types, parent), predicates, sizes)
    actions = tuple(planner.action(*schema) for schema in schemas)
    if len(sections.get(":goal", [])) != 1:
        raise UserError("its problem has no goal.")
    changing = frozenset(effect.predicate for action in actions for effect in action.effects)
    goal = planner.search(_condition(sections[":goal"][0], {}, planner.range_of), frozenset())[0]
    return Problem(types, facts, actions, goal, changing)


# ---------------------------------------------------------------------------------------------- reading


def _parse(text: str) -> list[Expression]:
    """Returns the nested lists of a text of parentheses, in lower case, without comments."""
    stack: list[list[Expression]] = [[]]
    for token in _TOKEN.findall(re.sub(r";[^\n]*", "", text).lower()):
        if token == "(":
            stack.append([])
        elif token != ")":
            stack[-1].append(token)
        elif len(stack) == 1:
            raise UserError("its PDDL has a parenthesis too many.")
        else:
            stack[-2].append(stack.pop())
    if len(stack) != 1 or len(stack[0]) != 1 or not isinstance(stack[0][0], list):
        raise UserError("its PDDL is not one expression in parentheses.")
    return stack[0][0]


def _sections(text: str) -> dict[str, list[Expression]]:
    """Returns the sections of a problem: (:init ...) -> {":init": [[...]]}; the goal alone has one expression."""
    sections = {}
    for part in _parse(text)[1:]:
        keyword, *content = part if isinstance(part, list) and part else [""]
        sections[keyword] = content if keyword == ":goal" else [content]
    return sections


def _words(expression: Expression) -> list[str]:
    if not expression or isinstance(expression, str) or not all(isinstance(word, str) for word in expression):
        raise UserError(f"its PDDL has {expression!r}, where a predicate and its arguments belong.")
    return expression


def _typed(words: Expression) -> list[tuple[str, str]]:
    """Reads `a b - t c`: [("a", "t"), ("b", "t"), ("c", "object")]."""
    pairs, names, rest = [], [], iter(_words(["", *words])[1:])
    for word in rest:
        if word != "-":
            names.append(word)
            continue
        pairs += [(name, kind) for kind in itertools.islice(rest, 1) for name in names]
        names = []
    return pairs + [(name, _ROOT_TYPE) for name in names]


@functools.lru_cache(maxsize=4)
def _read_domain(text: str) -> tuple[dict[str, str], dict[str, str], dict[str, int], tuple[tuple[Expression, ...], ...]]:
    """Returns type -> supertype, constant -> type, predicate -> the number of its arguments, and the actions.

    An action is (name, parameters, precondition, effect).
    """
    parent, constants, predicates, schemas = {}, {}, {}, []
    for part in _parse(text)[1:]:
        keyword, *content = part if isinstance(part, list) and part else [""]
        if keyword == ":types":
            parent = dict(_typed(content))
        elif keyword == ":constants":
            constants = dict(_typed(content))
        elif keyword == ":predicates":
            predicates = {_words(predicate)[0]: len(_typed(predicate[1:])) for predicate in content}
        elif keyword == ":action":
            fields = dict(zip(content[1::2], content[2::2], strict=False))
            parameters = tuple(_typed(fields.get(":parameters", [])))
            schemas.append((content[0], parameters, fields.get(":precondition", []), fields.get(":effect", [])))
        elif keyword in (":derived", ":durative-action"):
            raise UserError(f"its domain has {keyword}, which is not supported.")
    return parent, constants, predicates, tuple(schemas)


def _objects_by_type(types: Mapping[str, str], parent: Mapping[str, str]) -> dict[str, frozenset[str]]:
    members: dict[str, set[str]] = {_ROOT_TYPE: set(types)}
    for name, kind in types.items():
        while kind != _ROOT_TYPE:
            members.setdefault(kind, set()).add(name)
            kind = parent.get(kind, _ROOT_TYPE)
    return {kind: frozenset(names) for kind, names in members.items()}


# ---------------------------------------------------------------------------------------------- conditions

# A condition is ("fact", predicate, terms), ("=", terms), ("and", conditions), ("or", conditions), ("not", condition) or
# ("exists", variables, condition). Each quantified variable has a name of its own.
Condition = tuple[Any, ...]


def _condition(expression: Expression, names: Mapping[str, str], declare: Callable[[str, str], str]) -> Condition:
    """Reads a condition.

    Args:
        names: variable in scope -> its own name.
        declare: returns an own name for a quantified variable of a type.
    """
    if not expression:
        return ("and", ())
    if isinstance(expression, str):
        raise UserError(f"its PDDL has the condition {expression!r}, which is not in parentheses.")
    head, *parts = expression
    if head in ("and", "or"):
        return (head, tuple(_condition(part, names, declare) for part in parts))
    if head == "not" and len(parts) == 1:
        return ("not", _condition(parts[0], names, declare))
    if head == "imply" and len(parts) == 2:
        return ("or", (("not", _condition(parts[0], names, declare)), _condition(parts[1], names, declare)))
    if head in ("exists", "forall") and len(parts) == 2:
        own = {name: declare(name, kind) for name, kind in _typed(parts[0])}
        inner = _condition(parts[1], {**names, **own}, declare)
        variables = tuple(own.values())
        return ("exists", variables, inner) if head == "exists" else ("not", ("exists", variables, ("not", inner)))
    terms = tuple(names.get(word, word) for word in _words(expression)[1:])
    return ("=", terms) if head == "=" else ("fact", head, terms)


def _free(condition: Condition) -> frozenset[str]:
    """Returns the free variables of a condition."""
    kind, *rest = condition
    if kind in ("fact", "="):
        return frozenset(term for term in rest[-1] if term.startswith("?"))
    if kind == "not":
        return _free(rest[0])
    if kind == "exists":
        return _free(rest[1]) - set(rest[0])
    return frozenset().union(*map(_free, rest[0]))


def _required(condition: Condition) -> Iterator[tuple[str, tuple[str, ...]]]:
    if condition[0] == "fact":
        yield condition[1], condition[2]
    elif condition[0] == "and":
        for part in condition[1]:
            yield from _required(part)


class _Planner:
    """Turns conditions into searches for one problem.

    Args:
        members: type -> its objects.
        predicates: predicate -> the number of its arguments.
        sizes: predicate -> the number of its facts in the initial state.
    """

    def __init__(self, members: Mapping[str, frozenset[str]], predicates: Mapping[str, int], sizes: Mapping[str, int]):
        self._members = members
        self._predicates = predicates
        self._sizes = sizes
        self._ranges: dict[str, frozenset[str]] = {}

    def range_of(self, variable: str, kind: str) -> str:
        """Returns an own name for a variable of a type; a type without objects is as good as any."""
        own = f"{variable}/{len(self._ranges)}"
        self._ranges[own] = self._members.get(kind, frozenset())
        return own

    def action(self, name: str, parameters: tuple[tuple[str, str], ...], precondition: Expression, effect: Expression) -> Action:
        self._ranges |= {variable: self._members.get(kind, frozenset()) for variable, kind in parameters}
        scope = {variable: variable for variable, _ in parameters}
        condition = _condition(precondition, scope, self.range_of)
        bound = frozenset(scope)
        search = _all([self.search(condition, frozenset())[0], *self._each(bound - _free(condition))])
        effects = tuple(self._effects(effect, scope, bound, ("and", ())))
        return Action(name, parameters, search, frozenset(_required(condition)), effects)

    def _effects(self, effect: Expression, names: Mapping[str, str], bound: frozenset[str], given: Condition) -> Iterator[Effect]:
        head, *parts = effect if effect else ["and"]
        if head == "and":
            for part in parts:
                yield from self._effects(part, names, bound, given)
        elif head == "when":
            condition = _condition(parts[0], names, self.range_of)
            yield from self._effects(parts[1], names, bound, ("and", (given, condition)))
        elif head == "forall":
            own = {name: self.range_of(name, kind) for name, kind in _typed(parts[0])}
            yield from self._effects(parts[1], {**names, **own}, bound, given)
        elif head not in ("increase", "assign"):
            predicate, *words = _words(parts[0] if head == "not" else effect)
            terms = tuple(names.get(word, word) for word in words)
            self._check(predicate, terms)
            search, known = self.search(given, bound)
            missing = {term for term in terms if term.startswith("?")} - known
            yield Effect(_all([search, *self._each(missing)]), head == "not", predicate, terms)

    def search(self, condition: Condition, bound: frozenset[str]) -> tuple[Search, frozenset[str]]:
        """Returns a search for bindings of all free variables of a condition, and the variables that are bound after it."""
        kind, *rest = condition
        free = _free(condition)
        if kind == "fact":
            return self._fact(rest[0], rest[1], bound), bound | free
        if kind == "=":
            return _all([*self._each(free - bound), functools.partial(_equal, rest[0])]), bound | free
        if kind == "not":
            inner, _ = self.search(rest[0], bound | free)
            return _all([*self._each(free - bound), functools.partial(_absent, inner)]), bound | free
        if kind == "exists":
            inner, known = self.search(rest[1], bound)
            inner = _all([inner, *self._each(set(rest[0]) - known)])
            return functools.partial(_once, inner, tuple(sorted(free - bound))), bound | free
        if kind == "or":
            ways = []
            for part in rest[0]:
                way, known = self.search(part, bound)
                ways.append(_all([way, *self._each(free - known)]))
            return functools.partial(_any, ways), bound | free
        searches, left = [], list(rest[0])
        while left:
            part = min(left, key=lambda part: self._cost(part, bound))
            left.remove(part)
            search, bound = self.search(part, bound)
            searches.append(search)
        return _all(searches), bound

    def _cost(self, condition: Condition, bound: frozenset[str]) -> tuple[int, int]:
        """What comes first in a conjunction: tests, then the rarest facts; last what has to try all objects of a type."""
        if _free(condition) <= bound:
            return 0, 0
        return (1, self._sizes.get(condition[1], 0)) if condition[0] == "fact" else (2 + (condition[0] in ("not", "=")), 0)

    def _fact(self, predicate: str, terms: tuple[str, ...], bound: frozenset[str]) -> Search:
        self._check(predicate, terms)
        fresh = {term: i for i, term in reversed(list(enumerate(terms))) if term.startswith("?") and term not in bound}
        if not fresh:
            return functools.partial(_holds, predicate, terms)
        fixed = [(i, term) for i, term in enumerate(terms) if fresh.get(term) != i]
        return functools.partial(_match, predicate, fixed, [(term, i, self._ranges[term]) for term, i in fresh.items()])

    def _check(self, predicate: str, terms: tuple[str, ...]) -> None:
        """Raises UserError for a fact that the domain does not define."""
        undeclared = [term for term in terms if term.startswith("?") and term not in self._ranges]
        if self._predicates.get(predicate) != len(terms) or undeclared:
            raise UserError(f"its PDDL has ({' '.join((predicate, *terms))}), of which it does not declare all.")

    def _each(self, variables: Set[str]) -> list[Search]:
        """Searches that try all objects for each of these variables."""
        return [functools.partial(_try, name, sorted(self._ranges[name])) for name in sorted(variables)]


# ---------------------------------------------------------------------------------------------- searches


def _ground(terms: tuple[str, ...], binding: Binding) -> tuple[str, ...]:
    return tuple([binding.get(term, term) for term in terms])


def _all(searches: list[Search]) -> Search:
    return searches[0] if len(searches) == 1 else functools.partial(_chain, tuple(searches))


def _chain(searches: tuple[Search, ...], binding: Binding, facts: Facts) -> Iterator[Binding]:
    if not searches:
        yield binding
        return
    for extended in searches[0](binding, facts):
        yield from _chain(searches[1:], extended, facts)


def _holds(predicate: str, terms: tuple[str, ...], binding: Binding, facts: Facts) -> Iterator[Binding]:
    if _ground(terms, binding) in facts(predicate):
        yield binding


def _match(predicate: str, fixed: list, fresh: list, binding: Binding, facts: Facts) -> Iterator[Binding]:
    # A variable that occurs twice is fresh at its first place, and must have the same value at the second.
    for arguments in facts(predicate):
        extended = {**binding, **{term: arguments[i] for term, i, _ in fresh}}
        if all([arguments[i] == extended.get(term, term) for i, term in fixed]):
            if all([arguments[i] in allowed for _, i, allowed in fresh]):
                yield extended


def _try(variable: str, values: list[str], binding: Binding, facts: Facts) -> Iterator[Binding]:
    for value in values:
        yield {**binding, variable: value}


def _equal(terms: tuple[str, ...], binding: Binding, facts: Facts) -> Iterator[Binding]:
    if len(set(_ground(terms, binding))) == 1:
        yield binding


def _absent(search: Search, binding: Binding, facts: Facts) -> Iterator[Binding]:
    if next(search(binding, facts), None) is None:
        yield binding


def _once(search: Search, variables: tuple[str, ...], binding: Binding, facts: Facts) -> Iterator[Binding]:
    seen = set()
    for extended in search(binding, facts):
        values = tuple(extended[name] for name in variables)
        if values not in seen:
            seen.add(values)
            yield {**binding, **dict(zip(variables, values, strict=True))}


def _any(searches: list[Search], binding: Binding, facts: Facts) -> Iterator[Binding]:
    for search in searches:
        yield from search(binding, facts)
